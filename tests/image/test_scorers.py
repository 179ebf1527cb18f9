"""Scorers load the real formats and give what the libraries' own models say."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from alignkit.demo.images import MODEL
from alignkit.errors import ConfigError, DataError
from alignkit_diffusion.scorers import SCORERS, load_scorer
from alignkit_diffusion.scorers.base import Scorer

PROMPTS = ["a red circle", "a blue square left of a circle", "a red circle"]


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP folder as the hub has them, small."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = CLIPConfig(
        text_config={**tower, **text, **ends},
        vision_config={**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """An open_clip folder as the hub has them, small."""
    folder = tmp_path_factory.mktemp("hps")
    config = {
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(1)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_pickscore_is_the_logit_of_its_clip(clip):
    images = pictures((40, 40), (32, 48), (64, 32))
    scores = load_scorer("pickscore", str(clip))(PROMPTS, images)
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for prompt, image, score in zip(PROMPTS, images, scores, strict=True):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        with torch.no_grad():
            logit = model(**inputs).logits_per_image.item()
        assert score == pytest.approx(logit, abs=1e-4)


def test_clip_score_is_a_hundred_cosines_whatever_the_logit_scale(clip):
    scores = load_scorer("clip", str(clip))(PROMPTS, pictures((32, 32), (32, 32), (32, 32)))
    logits = load_scorer("pickscore", str(clip))(PROMPTS, pictures((32, 32), (32, 32), (32, 32)))
    scale = CLIPModel.from_pretrained(clip).logit_scale.exp().item()
    assert scores == pytest.approx([100 * logit / scale for logit in logits], abs=1e-4)
    assert all(abs(score) <= 100 for score in scores)


def test_hpsv2_is_a_hundred_cosines_of_open_clip(hps):
    image = pictures((32, 32))[0]
    (score,) = load_scorer("hpsv2", str(hps))(PROMPTS[:1], [image])
    model = open_clip.create_model(f"local-dir:{hps}").eval()
    prepare = open_clip.image_transform(32, is_train=False)
    tokens = open_clip.get_tokenizer(f"local-dir:{hps}")(PROMPTS[:1])
    with torch.no_grad():
        features = model.encode_image(prepare(image)[None]), model.encode_text(tokens)
    assert score == pytest.approx(100 * functional.cosine_similarity(*features).item(), abs=1e-4)


def test_hpsv2_sees_the_whole_of_a_long_image(hps):
    wide = pictures((32, 96))[0]
    other = wide.copy()
    other.paste((255, 0, 0), (90, 0, 96, 32))  # a centre crop would not see this edge
    scores = load_scorer("hpsv2", str(hps))(PROMPTS[:2], [wide, other])
    assert scores[0] != scores[1]


@pytest.mark.parametrize("layers", [(8, 1), (1,)])
def test_aesthetic_is_linear_layers_on_the_unit_embedding(clip, tmp_path, layers):
    torch.manual_seed(2)
    weights, size = {}, 12
    for number, width in zip((0, 2), layers, strict=False):
        name = f"layers.{number}." if len(layers) > 1 else ""
        weights[f"{name}weight"], weights[f"{name}bias"] = (
            torch.randn(width, size),
            torch.randn(width),
        )
        size = width
    path = tmp_path / "head.safetensors"
    save_file(weights, path)
    image = pictures((32, 32))[0]
    (score,) = load_scorer("aesthetic", f"{path}+{clip}")(["whatever"], [image])
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=["x"], images=[image], return_tensors="pt")
    with torch.no_grad():
        x = model(**inputs).image_embeds[0].double()  # of length 1
    for weight, bias in zip(*[iter(weights.values())] * 2, strict=True):
        x = weight.double() @ x + bias.double()
    assert score == pytest.approx(x.item(), abs=1e-4)


def test_published_architectures_have_the_layouts_of_their_checkpoints():
    """Names and shapes of the published weights, on the meta device."""
    with torch.device("meta"):
        hps = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
        tower = {"num_hidden_layers": 1, "num_attention_heads": 16}
        vision = {**tower, "hidden_size": 1280, "intermediate_size": 5120, "patch_size": 14}
        text = {**tower, "hidden_size": 1024, "intermediate_size": 4096}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
        pick = CLIPModel(config).state_dict()
    assert len(hps) == 6 + 8 + 12 * 32 + 12 * 24
    shapes = {
        "visual.conv1.weight": (1280, 3, 14, 14),
        "visual.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "transformer.resblocks.23.mlp.c_fc.weight": (4096, 1024),
        "token_embedding.weight": (49408, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
    }
    assert {name: tuple(hps[name].shape) for name in shapes} == shapes
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        "text_projection.weight": (1024, 1024),
        "visual_projection.weight": (1024, 1280),
        "logit_scale": (),
    }
    assert {name: tuple(pick[name].shape) for name in shapes} == shapes


def test_weights_of_other_formats_and_shapes_are_refused(clip, hps, tmp_path):
    (tmp_path / "hps.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        load_scorer("hpsv2", str(tmp_path / "hps.pt"))
    save_file({"visual.conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="architecture"):
        load_scorer("hpsv2", str(tmp_path / "other.safetensors"))
    save_file({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(ConfigError, match="must take 12 numbers"):
        load_scorer("aesthetic", f"{tmp_path / 'head.safetensors'}+{clip}")
    for name in ("hpsv2", "aesthetic"):
        with pytest.raises(ConfigError, match="needs its weights named"):
            load_scorer(name)
    with pytest.raises(ConfigError, match="pickscore"):
        load_scorer("pikscore")
    assert set(SCORERS) == {"pickscore", "hpsv2", "clip", "aesthetic"}


def test_a_score_that_is_no_number_names_the_prompt():
    broken = Scorer("broken", "", [], lambda prompts, images: torch.tensor([float("nan")]))
    with pytest.raises(DataError, match="a red circle"):
        broken(PROMPTS[:1], pictures((8, 8)))
