"""Imported last by the server that ranks are forked from: the collector leaves alone what they inherit.

Else each rank would look through all of torch's objects again and again, and copy the pages they lie on.
"""

import gc

gc.freeze()
