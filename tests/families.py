"""One tiny model of each family of timm and of Transformers, with random weights and without a network."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.glora.toys import generator, seeded

CLASSES = 5


class MissingError(Exception):
    """The installed version does not have this family."""


class Family(NamedTuple):
    """The ``name`` of a family, the ``model`` that stands for it, and the options that make it small.

    ``package`` is "timm" or "transformers". For timm ``model`` is an architecture and ``options`` arguments of
    ``create_model``; for Transformers it is a class and ``options`` fields of its configuration.
    """

    package: str
    name: str
    model: str
    size: int
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"{self.package}/{self.name}"

    def build(self) -> nn.Module:
        """The model, always with the same weights, in eval mode. Raises MissingError."""
        with seeded():
            return (self._of_timm() if self.package == "timm" else self._of_transformers()).eval()

    def _of_timm(self) -> nn.Module:
        import timm

        if not timm.is_model(self.model):
            raise MissingError(f"no {self.model} in timm {timm.__version__}")
        return timm.create_model(self.model, num_classes=CLASSES, **self.options)

    def _of_transformers(self) -> nn.Module:
        if importlib.util.find_spec("transformers") is None:
            raise MissingError("no transformers")
        import transformers

        kind = getattr(transformers, self.model, None)
        if kind is None:
            raise MissingError(f"no {self.model} in transformers {transformers.__version__}")
        return kind(shrunk(kind.config_class, self.options))

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Arguments for ``model``: three images, token sequences or recordings."""
        if self.package == "timm":
            return {"x": torch.randn(3, 3, self.size, self.size, generator=generator())}
        return huggingface_inputs(model, self.size)

    def reload(self, file: Path) -> nn.Module:
        """timm's own way to load a state dict."""
        import timm

        return timm.create_model(self.model, num_classes=CLASSES, checkpoint_path=str(file), **self.options)


# -- timm ------------------------------------------------------------------------------------------

_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
_SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
_FOUR = (1, 1, 1, 1)


def _timm(name: str, model: str, size: int = 32, **options: Any) -> Family:
    return Family("timm", name, model, size, options)


# One architecture for each of timm's files, and a few more for their special parts.
TIMM = [
    _timm("beit", "beit_base_patch16_224", img_size=32, **_VIT),
    _timm("byoanet", "lambda_resnet26t", 64),
    _timm("byobnet", "test_byobnet"),
    _timm("byobnet, repvgg", "repvgg_a0"),
    _timm("byobnet, mobileone", "mobileone_s0"),
    _timm("cait", "cait_xxs24_224", img_size=32, depth=2),
    _timm("coat", "coat_tiny", img_size=32),
    _timm("convit", "convit_tiny", img_size=32, depth=2, local_up_to_layer=1),
    _timm("convmixer", "convmixer_768_32"),
    _timm("convnext", "test_convnext"),
    _timm("cpubone", "cpubone_nano"),
    _timm("crossvit", "crossvit_tiny_240", 240, depth=((1, 1, 0),)),
    _timm("csatv2", "csatv2", 64),
    _timm("cspnet", "cs3darknet_focus_s"),
    _timm("cspnext", "cspnext_tiny"),
    _timm("davit", "davit_tiny", depths=_FOUR, embed_dims=(24, 48, 96, 192), num_heads=(3, 3, 6, 12)),
    _timm("deepseek_vit", "deepseek_vit_412m", 28, **_VIT),
    _timm("deit", "deit_tiny_distilled_patch16_224", img_size=32, **_VIT),
    _timm("densenet", "densenet121", block_config=_FOUR),
    _timm("dla", "dla46x_c"),
    _timm("dpn", "dpn48b"),
    _timm("edgenext", "edgenext_xx_small"),
    _timm("efficientformer", "efficientformer_l1", 224),
    _timm("efficientformer_v2", "efficientformerv2_s0", img_size=32),
    _timm("efficientnet", "test_efficientnet"),
    _timm("efficientvim", "efficientvim_m1"),
    _timm("efficientvit_mit", "efficientvit_b0"),
    _timm("efficientvit_msra", "efficientvit_m0"),
    _timm("eva", "eva02_tiny_patch14_224", 28, img_size=28, **_VIT),
    _timm("fasternet", "fasternet_t0"),
    _timm("fastvit", "fastvit_t8", layers=_FOUR, embed_dims=(16, 32, 64, 128)),
    _timm("focalnet", "focalnet_tiny_srf"),
    _timm("gcvit", "gcvit_xxtiny", img_size=32),
    _timm("gemma4_vit", "gemma4_vit_167m_enc", 48, **_VIT),
    _timm("ghostnet", "ghostnet_050"),
    _timm("hardcorenas", "hardcorenas_b"),
    _timm("hgnet", "hgnetv2_b0"),
    _timm("hiera", "hiera_tiny_224", img_size=32, embed_dim=24, num_heads=1, stages=_FOUR),
    _timm("hieradet_sam2", "sam2_hiera_tiny", embed_dim=24, num_heads=1, stages=_FOUR),
    _timm("hrnet", "hrnet_w18_small"),
    _timm("iformer", "iformer_t"),
    _timm("inception_next", "inception_next_atto"),
    _timm("inception_resnet_v2", "inception_resnet_v2", 75),
    _timm("inception_v3", "inception_v3", 75),
    _timm("inception_v4", "inception_v4", 75),
    _timm("lcnetv2", "lcnetv2_small"),
    _timm("levit", "levit_128s", img_size=32, embed_dim=(16, 24, 32), depth=(1, 1, 1), num_heads=(2, 2, 2)),
    _timm("lowformer", "lowformer_b0"),
    _timm("mambaout", "test_mambaout"),
    _timm("maxxvit", "test_coatnet", img_size=32),
    _timm("metaformer", "poolformerv2_s12"),
    _timm("mlp_mixer", "gmlp_ti16_224", img_size=32),
    _timm("mobilenetv3", "mobilenetv3_small_050"),
    _timm("mobilenetv3, lcnet", "lcnet_035"),
    _timm("mobilenetv5", "mobilenetv5_base", channel_multiplier=0.25),
    _timm("mobilevit", "mobilevit_xxs"),
    _timm("mvitv2", "mvitv2_tiny"),
    _timm("naflexvit", "naflexvit_base_patch16_gap", **_VIT),
    _timm("nasnet", "nasnetalarge", 96, num_features=1344),
    _timm("nest", "nest_tiny", img_size=32),
    _timm("nextvit", "nextvit_small"),
    _timm("nfnet", "test_nfnet"),
    _timm("nfnet, regnet", "nf_regnet_b0"),
    _timm("pit", "pit_ti_distilled_224", img_size=32),
    _timm("pnasnet", "pnasnet5large", 33),
    _timm("pvt_v2", "pvt_v2_b0"),
    _timm("qwen3_vit", "qwen3_vit_88m", **_VIT),
    _timm("rdnet", "rdnet_tiny", growth_rates=(8, 16, 16, 16, 16, 16, 16)),
    _timm("regnet", "regnetx_002"),
    _timm("repghost", "repghostnet_050"),
    _timm("repvit", "repvit_m1"),
    _timm("res2net", "res2next50", layers=_FOUR),
    _timm("resnest", "resnest14d"),
    _timm("resnet", "test_resnet"),
    _timm("resnetv2", "resnetv2_18"),
    _timm("resnetv2, StdConv2d", "resnetv2_50x1_bit"),
    _timm("rexnet", "rexnet_100"),
    _timm("selecsls", "selecsls42"),
    _timm("senet", "legacy_seresnet18"),
    _timm("sequencer", "sequencer2d_s", layers=_FOUR),
    _timm("shvit", "shvit_s1"),
    _timm("sknet", "skresnet18"),
    _timm("starnet", "starnet_s050"),
    _timm("swiftformer", "swiftformer_xs"),
    _timm("swin_transformer", "swin_tiny_patch4_window7_224", img_size=32, **_SWIN),
    _timm("swin_transformer_v2", "swinv2_tiny_window8_256", img_size=32, **_SWIN),
    _timm("swin_transformer_v2_cr", "swinv2_cr_tiny_224", img_size=32, **_SWIN),
    _timm("tiny_vit", "tiny_vit_5m_224"),
    _timm("tnt", "tnt_s_legacy_patch16_224", img_size=32, depth=2),
    _timm("tresnet", "tresnet_m", layers=_FOUR, width_factor=0.5),
    _timm("twins", "twins_svt_small", depths=_FOUR, embed_dims=(16, 32, 64, 128)),
    _timm("vgg", "vgg11_bn", mlp_ratio=0.02),
    _timm("visformer", "visformer_tiny", img_size=32, depth=(1, 1, 1)),
    _timm("vision_transformer", "test_vit"),
    _timm("vision_transformer_hybrid", "vit_base_r50_s16_224", img_size=32, **_VIT),
    _timm("vision_transformer_relpos", "test_vit_relpos", img_size=32),
    _timm("vision_transformer_sam", "samvit_base_patch16_224", img_size=32, global_attn_indexes=(1,), **_VIT),
    _timm("vitamin", "vitamin_small_224", img_size=32, depth=2),
    _timm("volo", "volo_d1_224", img_size=32),
    _timm("vovnet", "ese_vovnet19b_slim_dw"),
    _timm("xception", "legacy_xception"),
    _timm("xception_aligned", "xception41p"),
    _timm("xcit", "xcit_nano_12_p8_224", img_size=32, depth=2),
]


# -- Transformers ----------------------------------------------------------------------------------

VOCABULARY, WIDTH, LAYERS, HEADS, TOKENS = 40, 16, 2, 2, 7
# The value of each field, in every configuration that has it.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "d_embed", "pooler_hidden_size", "projection_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "num_kv_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size"), WIDTH // HEADS),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 24),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 32),
    "max_target_positions": 32,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_labels": CLASSES,
    "use_cache": False,
}


def shrunk(kind: type, options: Mapping[str, Any]) -> Any:
    """A configuration of this kind, and of the configurations within it, with small numbers."""
    plain = kind()
    known = {"num_labels": 0, **plain.to_dict()}
    fields = {
        name: small for name, small in SMALL.items() if name in known and not isinstance(known[name], list | tuple)
    }
    for name, inner in getattr(kind, "sub_configs", {}).items():
        if isinstance(getattr(plain, name, None), inner):
            fields[name] = shrunk(inner, {}).to_dict()
    return kind(**{**fields, **copy.deepcopy(dict(options))})


def huggingface_inputs(model: nn.Module, size: int) -> dict[str, Tensor]:
    """The arguments that ``forward`` needs, by the name of the model's main input."""
    gen, main = generator(), getattr(model, "main_input_name", "input_ids")
    ids = torch.randint(3, VOCABULARY, (3, TOKENS), generator=gen)
    config = model.config  # type: ignore[union-attr]
    given: dict[str, Tensor] = {}
    if main == "pixel_values":
        given["pixel_values"] = torch.randn(3, 3, size, size, generator=gen)
    elif main == "input_values":
        given["input_values"] = torch.randn(3, size, generator=gen)
    elif main == "input_features":
        given["input_features"] = torch.randn(3, config.num_mel_bins, size, generator=gen)
    else:
        given["input_ids"] = ids
    if config.model_type in ("clip", "siglip"):
        given["pixel_values"] = torch.randn(3, 3, size, size, generator=gen)
        given["input_ids"] = ids
    if getattr(config, "is_encoder_decoder", False) and "Sequence" not in type(model).__name__:
        given["decoder_input_ids"] = ids.flip(1)
    return given


def _hf(name: str, model: str, size: int = 32, **options: Any) -> Family:
    return Family("transformers", name, model, size, options)


_EARS = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
_EARS |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": WIDTH}

TRANSFORMERS = [
    _hf("albert", "AlbertForSequenceClassification"),
    _hf("bart", "BartForConditionalGeneration"),
    _hf("beit", "BeitForImageClassification"),
    _hf("bert", "BertForSequenceClassification"),
    _hf("bert, masked", "BertForMaskedLM"),
    _hf("bloom", "BloomForCausalLM"),
    _hf("clip", "CLIPModel"),
    _hf("codegen", "CodeGenForCausalLM", rotary_dim=4),
    _hf("cohere", "CohereForCausalLM"),
    _hf("convbert", "ConvBertForSequenceClassification"),
    _hf("convnext", "ConvNextForImageClassification", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], patch_size=4),
    _hf("deberta", "DebertaForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _hf("deberta-v2", "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _hf("deit", "DeiTForImageClassificationWithTeacher"),
    _hf("dinov2", "Dinov2ForImageClassification"),
    _hf("distilbert", "DistilBertForSequenceClassification"),
    _hf("electra", "ElectraForSequenceClassification"),
    _hf("falcon", "FalconForCausalLM"),
    _hf("funnel", "FunnelForSequenceClassification", block_sizes=[1, 1], d_inner=24),
    _hf("gemma", "GemmaForCausalLM"),
    _hf("gemma2", "Gemma2ForCausalLM"),
    _hf("gpt2", "GPT2LMHeadModel"),
    _hf("gpt2, classes", "GPT2ForSequenceClassification"),
    _hf("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    _hf("gpt_neox", "GPTNeoXForCausalLM"),
    _hf("gpt_oss", "GptOssForCausalLM"),
    _hf("gptj", "GPTJForCausalLM", rotary_dim=4),
    _hf("granite", "GraniteForCausalLM"),
    _hf("hubert", "HubertForSequenceClassification", 400, **_EARS),
    _hf("levit", "LevitForImageClassification", 64),
    _hf("llama", "LlamaForCausalLM"),
    _hf("llama, tied", "LlamaForCausalLM", tie_word_embeddings=True),
    _hf("llama, classes", "LlamaForSequenceClassification"),
    _hf("longformer", "LongformerForSequenceClassification", attention_window=4),
    _hf("m2m_100", "M2M100ForConditionalGeneration"),
    _hf("mamba", "MambaForCausalLM"),
    _hf("marian", "MarianMTModel"),
    _hf("mistral", "MistralForCausalLM"),
    _hf("mixtral", "MixtralForCausalLM"),
    _hf("mobilebert", "MobileBertForSequenceClassification", true_hidden_size=WIDTH, intra_bottleneck_size=WIDTH),
    _hf("mobilenet_v2", "MobileNetV2ForImageClassification", depth_multiplier=0.25),
    _hf("mobilevit", "MobileViTForImageClassification", hidden_sizes=[8, 8, 8], neck_hidden_sizes=[8] * 7),
    _hf("modernbert", "ModernBertForSequenceClassification"),
    _hf("mpnet", "MPNetForSequenceClassification"),
    _hf("mpt", "MptForCausalLM"),
    _hf("olmo2", "Olmo2ForCausalLM"),
    _hf("opt", "OPTForCausalLM"),
    _hf("pegasus", "PegasusForConditionalGeneration"),
    _hf("phi", "PhiForCausalLM"),
    _hf("phi3", "Phi3ForCausalLM"),
    _hf("poolformer", "PoolFormerForImageClassification", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    _hf("qwen2", "Qwen2ForCausalLM"),
    _hf("qwen2_moe", "Qwen2MoeForCausalLM"),
    _hf("qwen3", "Qwen3ForCausalLM"),
    _hf("regnet", "RegNetForImageClassification", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], groups_width=8),
    _hf("resnet", "ResNetForImageClassification", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], embedding_size=8),
    _hf("roberta", "RobertaForSequenceClassification"),
    _hf("segformer", "SegformerForImageClassification", hidden_sizes=[8, 16, 40, 64], depths=[1, 1, 1, 1]),
    _hf("siglip", "SiglipModel"),
    _hf("squeezebert", "SqueezeBertForSequenceClassification"),
    _hf("stablelm", "StableLmForCausalLM"),
    _hf("starcoder2", "Starcoder2ForCausalLM"),
    _hf("swin", "SwinForImageClassification", depths=[1, 1], num_heads=[2, 2], patch_size=4, window_size=4),
    _hf("swinv2", "Swinv2ForImageClassification", depths=[1, 1], num_heads=[2, 2], patch_size=4, window_size=4),
    _hf("switch_transformers", "SwitchTransformersForConditionalGeneration"),
    _hf("t5", "T5ForConditionalGeneration"),
    _hf("vit", "ViTForImageClassification"),
    _hf("wav2vec2", "Wav2Vec2ForSequenceClassification", 400, **_EARS),
    _hf("whisper", "WhisperForConditionalGeneration", 64, num_mel_bins=8),
    _hf("xlm-roberta", "XLMRobertaForTokenClassification"),
    _hf("xlnet", "XLNetForSequenceClassification"),
]

FAMILIES = [*TIMM, *TRANSFORMERS]
