"""Where a metric is shown on a run's page (wandb, TensorBoard): both group panels by a name's first part.

docs/metrics.md has the same sections. The headline has no section and so stands above them.
"""

HEADLINE = ("loss", "text_loss", "image_loss", "grad_norm", "learning_rate", "tokens_per_s", "mfu")
# By the stem of a name, what comes before its first slash: text_loss/SOURCE lies where text_loss does.
STEMS = {
    "loss": ("loss", "text_loss", "perplexity", "image_loss", "image_loss_by_order", "x0_error"),
    "gradients": ("grad_norm", "update_ratio", "learning_rate", "skipped_updates"),
    "data": (
        *("tokens", "images", "documents", "epoch", "epoch_min", "epoch_mean", "epoch_max", "text_tokens"),
        *("text_targets", "image_tokens", "clean_images", "padding_share", "idle_row_share", "skipped_documents"),
        *("skips",),
    ),
    "speed": (
        *("tokens_per_s", "images_per_s", "step_s", "mfu", "hfu", "mfu_bagel", "model_tflops_per_s_per_rank"),
        *("data_stall_share", "checkpoint_stall_share", "evaluation_share", "slowest_lag_share", "attention_imbalance"),
    ),
    "memory": ("host_memory_gib", "device_memory_gib"),
    "progress": ("tokens_seen", "images_seen", "rollbacks", "stop_s"),
    "heldout": ("heldout", "heldout_ema"),
}
# A panel of these would show nothing: the axis and its clock, a constant, and names.
NO_PANEL = ("step", "time", "interval_steps", "slowest_rank", "slowest_host")
_SECTIONS = {stem: section for section, stems in STEMS.items() for stem in stems}


def section_of(name: str) -> str | None:
    """Return the section of a metric's name in metrics.jsonl; None: it has no panel."""
    stem = name.split("/")[0]
    return None if stem in NO_PANEL else _SECTIONS.get(stem, "other")


def page_name(name: str) -> str | None:
    """Return the name under which a metric is shown, SECTION/NAME; None: it has no panel.

    Held-out losses of the EMA's weights are next to those of the raw ones, as heldout/SOURCE/KIND_ema.
    """
    section = section_of(name)
    if section is None or name in HEADLINE:
        return None if section is None else name
    stem, _, rest = name.partition("/")
    if stem == "heldout_ema":
        return f"heldout/{rest}_ema"
    return name if stem == section else f"{section}/{name}"
