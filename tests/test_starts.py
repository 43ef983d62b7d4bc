"""The presets that start from language models are resolved by a plan, from their published config.json alone."""

import json
from pathlib import Path

import pytest

from train.plan import main as plan

STARTS = Path(__file__).parents[1] / "configs" / "starts"
ROPE = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLMS = {  # family; vocabulary, width, hidden, layers, heads, kv heads, head_dim; theta, eps, what else; parameters
    "qwen3-0.6b": ("qwen3", (151_936, 1024, 3072, 28, 16, 8, 128), 1e6, 1e-6, {}, 596_049_920),
    "smollm2-360m": ("llama", (49_152, 960, 2560, 32, 15, 5, 64), 1e5, 1e-5, {}, 361_821_120),
    "llama-3.2-1b": (
        *("llama", (128_256, 2048, 8192, 16, 32, 8, 64), 5e5, 1e-5),
        {"rope_scaling": {"rope_type": "llama3", **ROPE}},
        1_235_814_400,
    ),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim")
LMFUSION = [
    "model.untied=all",
    'optim.groups={images: {parameters: ["*.image.*", "*.image_norm.*"]}, '
    'text: {parameters: ["transformer.*", "text_*"], frozen: true}}',
]

LORA = ["model.lora.rank=16", "world_size=1", "data.lanes=2"]


def planned(name: str, folder: Path, capsys: pytest.CaptureFixture, *more: str) -> dict:
    """Return the plan of a preset on eight GPUs of 24 GB, its model's weights absent."""
    family, sizes, theta, eps, others, _ = LLMS[name]
    config = {"model_type": family, **dict(zip(SIZES, sizes, strict=True)), **others}
    config |= {"rope_theta": theta, "rms_norm_eps": eps, "tie_word_embeddings": True, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan(
        [
            f"config={STARTS / name}.yaml",
            f"init_from_llm={folder}",
            f"data.tokenizer={folder}",
            "data.lanes=16",
            "json=true",
            *more,
        ]
    )
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["qwen3-0.6b", *(pytest.param(n, marks=pytest.mark.slow) for n in [*LLMS][1:])])
def test_a_presets_model_is_the_published_one_and_fits_its_hardware(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its parameters are the language model's to the last, but for patches and three ids, padded to 64 rows."""
    found = planned(name, tmp_path, capsys, "gpu=4090")
    counts, (vocab_size, width, *_), total = found["parameters"], LLMS[name][1], LLMS[name][-1]
    assert found["fits"] and found["trained_parameters"] == counts and counts["heads"] == 0
    assert counts["total"] - counts["patches"] - 64 * width == total and found["vocab_size"] == vocab_size + 3


@pytest.mark.slow
@pytest.mark.parametrize("more", [LORA, LMFUSION], ids=["lora", "lmfusion"])
def test_only_what_is_trained_takes_states(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """LMFusion's recipe: text frozen in bfloat16, images' copy of the trunk trained; and LoRA on one GPU."""
    found = planned("smollm2-360m", tmp_path, capsys, "gpu=4090", *more)
    counts, trained = found["parameters"], found["trained_parameters"]
    ranks, frozen = (1 if more is LORA else 8), counts["total"] - trained["total"]
    assert trained["embeddings"] == 0 < trained["patches"] and found["fits"]
    assert found["states_gib"]["frozen"] * 2**30 == pytest.approx(2 * frozen / ranks, rel=0.01)
    assert found["states_gib"]["optimizer"] * 2**30 == pytest.approx(8 * trained["total"] / ranks, rel=0.01)
    assert found["checkpoint_gib"] * 2**30 == pytest.approx(12 * trained["total"], rel=0.01)
    assert found["parameters_of_a_token"] == counts["total"] - (0 if more is LORA else trained["blocks"])
