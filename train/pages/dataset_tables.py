"""The tables that train.view prints of an encoded data set: sizes, lengths, latents, shards, example documents.

Totals are the manifest's; what needs the length of every document comes from the shards' indices.
"""

from collections import Counter
from collections.abc import Sized

from data.manifest import LatentSpec, LatentSums
from data.remote import shown
from data.shards import BadRecords
from train.pages.dataset_summary import Counts, EncodedData, ShownDocument, quantiles
from train.pages.terminal import Table, Value, View

LISTED = 20  # grids and shards, the largest
QUANTILES = {"shortest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}


def view_data(data: EncodedData, n: int, seed: int, sequence_length: int) -> View:
    """Count a data set and read `n` of its documents; raise ValueError where no index of it can be read."""
    bad = BadRecords(max_fraction=1.0)
    counts = data.count(sequence_length, bad)
    if not counts.documents:
        raise ValueError(
            f"shards={shown(data.manifest.store.root)}: none of {len(data.manifest.shards)} indices can be read "
            f"({bad.names[0]}); restore them, or encode the data set again"
        )
    documents, latents = data.read_documents(counts.shards, n, seed, bad)
    spec, tables = data.manifest.latent_spec, [_lengths(counts)]
    if spec is not None and data.manifest.grids():
        tables.append(_sizes(data, spec))
    if spec is not None and latents.cells:
        tables.append(_latents(spec, latents))
    tables += [_shards(data), _documents(documents)]
    if bad.reasons:
        tables.append(Table("missing or damaged", ["reason", "count"], sorted(bad.reasons.items())))
    pictures = [picture for document in documents for picture in document.pictures]
    remarks = _remarks(data, counts, bad)
    if given := sum(document.has_context for document in documents):
        remarks.append(
            f"{given} of the {len(documents)} documents shown have parts that are given (context), which bear no loss."
        )
    return View(_facts(data, counts, sequence_length), remarks, tables, pictures)


def _facts(data: EncodedData, counts: Counts, sequence_length: int) -> dict[str, Value]:
    manifest, spec, entries = data.manifest, data.manifest.latent_spec, data.manifest.shards
    several = counts.documents - counts.images[0] - counts.images[1]
    facts: dict[str, Value] = {
        "shards": len(entries),
        "documents": manifest.records,
        "images a document": f"none {counts.images[0]:,}, one {counts.images[1]:,}, several {several:,}",
        "images": sum(sum(entry.grids.values()) for entry in entries),
        "text tokens": sum(entry.text_tokens for entry in entries),
        "image tokens": f"{sum(entry.patches(data.patch_size) for entry in entries):,} (patch_size={data.patch_size})",
        f"longer than {sequence_length:,}": f"{counts.long:,} documents, {counts.long_with_images:,} with images",
        "size": f"{sum(entry.bytes for entry in entries) / 1e6:,.1f} MB",
        "tokenizer": f"{manifest.tokenizer_hash} ({manifest.vocab_size:,} ids)",
    }
    if spec is not None:
        sizes = f"{spec.channels} channels, stride {spec.stride}, {spec.resolution} pixels a side"
        facts["images are"] = f"{spec.images} ({sizes})"
    if manifest.captions:
        facts["captions drawn"] = ", ".join(f"{kind} {weight:g}" for kind, weight in manifest.captions.items())
    return facts


def _remarks(data: EncodedData, counts: Counts, bad: BadRecords) -> list[str]:
    """Say what is left out and why, and name what cannot be read."""
    remarks = []
    if data.space is None and data.manifest.grids():
        remarks.append("No vae=FOLDER was given, so no pictures are decoded into a sheet.png.")
    if data.tokenizer is None:
        remarks.append(
            "No tokenizer=MODEL was given: captions are those in the records' json, other texts show as the number of "
            "their tokens."
        )
    if missing := data.manifest.records - counts.documents:
        remarks.append(
            f"{missing:,} of {data.manifest.records:,} documents are in shards whose index cannot be read; lengths and "
            "images a document are those of the others."
        )
    remarks += [f"Missing or damaged: {name}" for name in bad.names]
    if more := bad.reasons.total() - len(bad.names):
        remarks.append(f"Missing or damaged: {more} more")
    return remarks


def _lengths(counts: Counts) -> Table:
    tallies = {"all": counts.lengths, "text": counts.text_tokens}
    rows: list[list[Value]] = [[name, *quantiles(tally, list(QUANTILES.values()))] for name, tally in tallies.items()]
    return Table("tokens a document", ["tokens", *QUANTILES], rows)


def _sizes(data: EncodedData, spec: LatentSpec) -> Table:
    """Return how many images have which latent grid, the most frequent first."""
    grids = sum((Counter(entry.grids) for entry in data.manifest.shards), Counter[str]())
    rows: list[list[Value]] = []
    for grid, count in grids.most_common(LISTED):
        h, w = map(int, grid.split("x"))
        rows.append([grid, f"{h * spec.stride}x{w * spec.stride}", w / h, count])
    title = f"image sizes, height x width{_cut(grids)}"
    return Table(title, ["latent grid", "pixels", "width / height", "images"], rows)


def _latents(spec: LatentSpec, latents: LatentSums) -> Table:
    """Compare the latents of the documents shown with the manifest's statistics, by channel."""
    columns = zip(spec.mean, latents.mean.tolist(), spec.std, latents.std.tolist(), strict=True)
    head = ["channel", "mean, manifest", "mean, shown", "std, manifest", "std, shown"]
    title = "latents: the manifest's statistics and those of the documents shown"
    return Table(title, head, [[channel, *values] for channel, values in enumerate(columns)])


def _shards(data: EncodedData) -> Table:
    rows: list[list[Value]] = [
        [one.name, one.records, sum(one.grids.values()), one.text_tokens, one.tokens(data.patch_size), one.bytes]
        for one in sorted(data.manifest.shards, key=lambda entry: -entry.records)
    ]
    head = ["shard", "documents", "images", "text tokens", "tokens", "bytes"]
    return Table(f"shards{_cut(rows)}", head, rows[:LISTED])


def _documents(documents: list[ShownDocument]) -> Table:
    rows: list[list[Value]] = []
    for one in documents:
        grids = Counter(f"{h}x{w}" for h, w in one.grids)
        latents = ", ".join(grid if count == 1 else f"{count} of {grid}" for grid, count in grids.items())
        rows.append([one.key, one.shard, one.num_tokens, latents, one.text])
    return Table("example documents", ["key", "shard", "tokens", "latents", "text"], rows)


def _cut(items: Sized) -> str:
    """Say in a title that a table leaves out the smaller ones."""
    return f" (the largest {LISTED} of {len(items):,})" if len(items) > LISTED else ""
