"""Print what an encoded data set holds before a model is trained on it, or what a run has saved so far.

With `shards`: counts, lengths, latent statistics and example documents; with `vae` also `output`/sheet.png, their
decoded pictures with captions. With `checkpoint`: the run's checkpoints, verified, and what the one holds that a resume
takes; this needs no GPU and memory for the largest tensor only. Exit status 1 if any checkpoint is damaged.
"""

from dataclasses import dataclass
from pathlib import Path

from data.durable import atomic_write
from data.pictures import contact_sheet
from data.storage import Location
from data.strict_json import dumps
from train.config import load_config, run_program
from train.output_folder import make_writable
from train.pages.checkpoint_tables import view_checkpoints
from train.pages.dataset_summary import EncodedData
from train.pages.dataset_tables import view_data
from train.pages.terminal import View

MOST_DOCUMENTS = 1000
SHEET_PICTURES = 200  # at most, so that the sheet can be opened


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    shards: Location | None = None  # folder of train.encode or its URL, or one shard in it (FOLDER/00012.tar)
    checkpoint: Location | None = None  # instead of shards: a run folder, a folder of checkpoints, or one checkpoint
    verify: bool = True  # read every byte of the checkpoints against their checksums; false: trust them
    json: bool = False  # print one JSON object instead of text
    vae: Location | None = None  # autoencoder that encoded the pictures; null: no sheet.png, except of pixels
    tokenizer: Location | None = None  # of the token ids, a file or folder; null: captions from the records' json
    n: int = 32  # documents shown, 1 to 1000
    seed: int = 0  # of the choice of documents
    patch_size: int = 2  # latent cells a side of an image token, as in the model to be trained; 1 or more
    sequence_length: int = 4096  # tokens of a training sequence: longer documents are counted; 1 or more
    output: Location = "runs/view"  # folder for sheet.png; used with vae, and of pixels

    def __post_init__(self) -> None:
        if (self.shards is None) == (self.checkpoint is None):
            raise ValueError(
                f"shards={self.shards}, checkpoint={self.checkpoint}: expected one of the two; give shards=FOLDER to "
                "look at data, or checkpoint=RUN to look at what training saved"
            )
        if not 1 <= self.n <= MOST_DOCUMENTS:
            raise ValueError(f"n={self.n}: expected 1 to {MOST_DOCUMENTS}, so that the listing can be read")
        for name in ("patch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")


CONFIG = ViewConfig


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    if config.shards is None:
        assert config.checkpoint is not None  # __post_init__
        view = view_checkpoints(Path(config.checkpoint), config.verify)
    else:
        data = EncodedData.open(config.shards, config.patch_size, config.tokenizer, config.vae)
        output = make_writable(Path(config.output)) if data.space is not None else None
        view = view_data(data, config.n, config.seed, config.sequence_length)
        if output is not None:
            write_sheet(view, output / "sheet.png")
    print(dumps(view.record()) if config.json else view.text())
    return int(view.damaged)


def write_sheet(view: View, path: Path) -> None:
    """Write the pictures with their captions, and remark on it."""
    if not view.pictures:
        path.unlink(missing_ok=True)  # it would show the documents of an earlier call
        view.remarks.append("None of the documents shown has pictures, so there is no sheet.png.")
        return
    chosen = view.pictures[:SHEET_PICTURES]
    sheet = contact_sheet([pixels for pixels, _ in chosen], [caption for _, caption in chosen], columns=8)
    with atomic_write(path) as file:
        sheet.save(file, "PNG")
    view.remarks.append(f"Wrote {path}: {len(chosen)} of the {len(view.pictures)} pictures decoded.")


if __name__ == "__main__":
    run_program(main)
