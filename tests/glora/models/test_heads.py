"""Which modules are taken for heads, that these train in full, and what is said of all that does not train."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel

import glora
from glora import glora_layers, inject, summary
from glora.models.heads import find_heads
from tests.glora.toys import generator, mlp, on_ranks, points, seeded, tiny_vit, unchanged

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")
CLASSES = 5
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {**TEXT, "image_size": 16, "patch_size": 4, "num_labels": CLASSES}
del IMAGE["vocab_size"]
WAVES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
WAVES |= {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embeddings": 4}
WAVES |= {"num_conv_pos_embedding_groups": 2}


def hf(task, config, **sizes):
    return getattr(transformers, task)(getattr(transformers, config)(**sizes))


def llama(task="LlamaForCausalLM", **options):
    return hf(task, "LlamaConfig", **TEXT, **options)


def t5(**options):
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return hf("T5ForConditionalGeneration", "T5Config", **sizes, **options)


def deit():
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("deit_tiny_distilled_patch16_224", **sizes, num_classes=CLASSES)


def within(model):
    return nn.ModuleDict({"neck": nn.Linear(4, 4), "net": model})


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (mlp, ["head"]),
        (tiny_vit, ["head"]),
        (deit, ["head", "head_dist"]),
        (lambda: timm.create_model("levit_128s"), ["head", "head_dist"]),
        (lambda: timm.create_model("mobilenetv3_small_050"), ["classifier"]),
        (lambda: timm.create_model("efficientnet_b0"), ["classifier"]),
        (lambda: timm.create_model("resnet18"), ["fc"]),
        (lambda: timm.create_model("resnet18", num_classes=0), []),
        (torchvision.models.resnet18, ["fc"]),
        (torchvision.models.efficientnet_b0, ["classifier"]),
        (torchvision.models.vit_b_16, ["heads"]),
        (lambda: hf("ViTForImageClassification", "ViTConfig", **IMAGE), ["classifier"]),
        (lambda: hf("BertForSequenceClassification", "BertConfig", **TEXT), ["classifier"]),
        (lambda: hf("BertForMaskedLM", "BertConfig", **TEXT), ["cls"]),
        (lambda: hf("BertModel", "BertConfig", **TEXT), []),
        (llama, ["lm_head"]),
        (lambda: llama("LlamaForSequenceClassification"), ["score"]),
        (t5, ["lm_head"]),
        (lambda: within(torchvision.models.resnet18()), ["net.fc"]),
        (lambda: within(timm.create_model("resnet18")), ["net.fc"]),
        (lambda: within(llama("LlamaForSequenceClassification")), ["net.score"]),
        (lambda: nn.ModuleDict({"block": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "fc": nn.Linear(4, 4)}), ["fc"]),
        (lambda: nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 4)}), []),
        (lambda: torch.compile(nn.ModuleDict({"body": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})), ["fc"]),
        (lambda: nn.ModuleDict({"net": torchvision.models.resnet18(), "loss": nn.CrossEntropyLoss()}), ["net.fc"]),
        (lambda: nn.ModuleDict({"net": nn.ModuleDict({"body": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})}), ["net.fc"]),
        (torchvision.models.vgg11, ["classifier.6"]),
        (torchvision.models.mobilenet_v3_small, ["classifier.3"]),
        (lambda: torchvision.models.googlenet(init_weights=False), ["aux1", "aux2", "fc"]),
        (lambda: nn.ModuleDict({"block": nn.ModuleDict({"head": nn.Linear(4, 4)})}), ["block.head"]),
        (lambda: nn.ModuleDict({"head": nn.Identity()}), []),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_heads(make, heads):
    with torch.device("meta"):
        assert list(find_heads(make())) == heads


def test_a_head_trains_in_full_and_holds_no_adapter():
    model = inject(hf("ViTForImageClassification", "ViTConfig", **IMAGE), 2)
    assert all(p.requires_grad for p in model.classifier.parameters())
    assert type(model.classifier) is nn.Linear
    assert "vit.layers.0.mlp.fc1" in glora_layers(model)


def test_exclude_adds_to_the_heads():
    model = inject(mlp(), 2, exclude=("fc2",))
    assert list(glora_layers(model)) == ["fc1"]
    assert all(p.requires_grad for name in ("fc2", "head") for p in model.get_submodule(name).parameters())


def test_a_head_that_a_target_selects_by_itself_is_adapted():
    assert list(glora_layers(inject(mlp(), 2, targets=["fc1", "head"]))) == ["fc1", "head"]


def test_of_a_head_a_target_may_select_a_part():
    """The rest of it, which is as fresh, trains in full."""
    config = {**TEXT, "num_labels": CLASSES}
    model = inject(
        hf("RobertaForSequenceClassification", "RobertaConfig", **config), 2, targets=("query", "classifier.dense")
    )
    assert "classifier.dense" in glora_layers(model)
    assert model.classifier.out_proj.weight.requires_grad


def test_a_module_may_not_be_a_head_and_excluded():
    with (
        unchanged(model := mlp()),
        pytest.raises(ValueError, match=r"heads: expected none of the excluded .* \['head'\]"),
    ):
        inject(model, 2, heads=["head"], exclude=["head"])


def test_bare_parameters_beside_the_base_model_train():
    model = inject(hf("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **WAVES, use_weighted_layer_sum=True), 2)
    assert model.layer_weights.requires_grad


def test_one_of_two_heads_that_is_frozen_is_named():
    model = deit()
    model.head_dist.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"heads \['head_dist'\] were frozen before"):
        inject(model, 2)


def test_a_target_that_selects_more_than_heads_leaves_them_alone():
    model = nn.ModuleDict({"body": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "fc": nn.Linear(4, 4)})
    assert list(glora_layers(inject(model, 2, targets=["fc"]))) == ["body.fc"]


def test_heads_that_are_named_replace_those_that_are_recognised():
    model = inject(mlp(), 2, heads=["fc2"])
    assert list(glora_layers(model)) == ["fc1", "head"]
    assert model.fc2.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_embedding_trains_unless_it_is_tied(tied):
    """Else the input embedding would go on training, frozen as it is meant to be."""
    model = inject(llama(tie_word_embeddings=tied), 2)
    assert model.lm_head.weight.requires_grad is not tied
    assert "lm_head" not in glora_layers(model)
    assert not model.model.embed_tokens.weight.requires_grad
    assert ("tied to another module" in str(summary(model))) is tied


def test_of_a_head_that_is_tied_in_part_the_rest_trains():
    model = inject(hf("BertForMaskedLM", "BertConfig", **TEXT), 2)
    frozen = {name for name, p in model.cls.named_parameters() if not p.requires_grad}
    assert frozen == {"predictions.decoder.weight"}


def test_a_tied_head_that_is_named_trains_with_what_it_is_tied_to():
    model = inject(llama(tie_word_embeddings=True), 2, heads=["lm_head"])
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert model.lm_head.weight.requires_grad


# -- models that something else has hold of ------------------------------------------------------------


def inject_after_ddp(file):
    """Into a replica, a model with one as a part, and by loading a file."""
    model = DistributedDataParallel(mlp(), find_unused_parameters=True)
    around = nn.Sequential(OrderedDict(body=model, head=nn.Linear(3, 3)))
    messages = []
    for call in (lambda: inject(model, 2), lambda: inject(around, 2), lambda: glora.load_adapter(model, file)):
        try:
            call()
        except TypeError as error:
            messages.append(str(error))
    return messages, sum(p.requires_grad for p in model.parameters())


def test_a_model_within_ddp_is_refused(tmp_path):
    """The replica has noted the parameters of before: support tensors would train apart on each rank."""
    glora.save_adapter(inject(mlp(), 2), tmp_path / "adapter")
    for messages, trained in on_ranks(2, tmp_path / "two", inject_after_ddp, tmp_path / "adapter"):
        assert ["not wrapped yet, got DistributedDataParallel" in message for message in messages] == [True] * 3
        assert [where in message for message, where in zip(messages, ("(the model)", "('body')", "(the model)"))]
        assert trained == len(list(mlp().parameters()))


def test_data_parallel_replicates_what_is_injected():
    model = DataParallel(mlp())
    assert list(glora_layers(inject(model, 2))) == ["fc1", "fc2"]


def test_a_model_of_peft_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with unchanged(model), pytest.raises(TypeError, match=r"no other library has adapted, got PEFT's Linear .*q_proj"):
        inject(model, 2)


def test_a_compiled_model_is_compiled_anew():
    model = mlp().eval()
    compiled = torch.compile(model, backend="eager")
    x = points().tensors[0]
    before = compiled(x)
    inject(compiled, 2)
    for layer in glora_layers(model).values():
        nn.init.ones_(layer.E)
    assert not torch.equal(compiled(x), before)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("by", ["torch.compile", "Module.compile"])
def test_a_layer_that_is_compiled_by_itself_is_refused(by):
    """It would go on calling what it was compiled from."""
    model = mlp()
    if by == "torch.compile":
        model.fc2 = torch.compile(model.fc2, backend="eager")
    else:
        model.fc2.compile(backend="eager")
    with unchanged(model), pytest.raises(TypeError, match=r"'?fc2'?.*compile it afterwards|compile.*\(layer 'fc2'\)"):
        inject(model, 2)
    assert list(glora_layers(inject(model, 2, exclude=["fc2"]))) == ["fc1"]


def test_names_are_those_without_wrappers():
    model = nn.ModuleDict({"net": torch.compile(mlp(), backend="eager"), "head": nn.Linear(3, 3)})
    assert list(glora_layers(inject(model, 2, targets=["net.fc1"]))) == ["net.fc1"]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.frozen, self.fc = nn.Linear(4, 4), nn.Embedding(4, 4), nn.Linear(4, 3)


def compiled_head(model):
    model.fc = torch.compile(model.fc, backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), compiled_head], ids=["model", "head"]
)
def test_heads_and_summary_of_a_compiled_model(wrap):
    summary = glora.summary(inject(wrap(Classifier()), 2))
    assert list(summary.adapted) == ["body"]
    assert list(summary.trained) == ["fc.weight", "fc.bias"]
    assert list(summary.frozen) == ["frozen.weight"]


# -- what cannot be adapted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q", "norm"), r"targets: 'norm' selects no nn.Linear, .* but 1 LayerNorm \('norm'\)"),
        (("q", "conv"), r"targets: 'conv' selects no nn.Linear, .* but 1 Conv1d \('conv'\)"),
    ],
)
def test_a_target_with_nothing_to_adapt_is_refused(targets, message):
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "conv": nn.Conv1d(4, 4, 1)})
    with unchanged(model), pytest.raises(ValueError, match=message):
        inject(model, 2, targets=targets)


def mixtral():
    return hf("MixtralForCausalLM", "MixtralConfig", **TEXT, num_local_experts=4)


def test_experts_in_one_parameter_are_not_passed_over_in_silence():
    with pytest.warns(UserWarning, match=r"2 modules .* stay frozen: 2 MixtralExperts \('model.layers.0.mlp.experts'"):
        model = inject(mixtral(), 2)
    found = summary(model)
    assert "several matrices in one parameter" in found.frozen["model.layers.0.mlp.experts.down_proj"]
    assert found.coverage < 0.5
    with pytest.raises(ValueError, match=r"targets: 'experts' selects no nn.Linear, .* but 2 MixtralExp"):
        inject(mixtral(), 2, targets=("experts", "q_proj"))


def test_subclasses_are_not_passed_over_in_silence():
    falcon = hf("FalconForCausalLM", "FalconConfig", **TEXT)
    with pytest.warns(UserWarning, match=r"8 modules .*: 8 FalconLinear \('net.transformer.h.0.self_attention.*"):
        model = inject(within(falcon), 2)
    assert list(glora_layers(model)) == ["neck"]
    with pytest.raises(ValueError, match=r"found none; it cannot adapt 8 FalconLinear \('transformer.h.0.*heads"):
        inject(hf("FalconForCausalLM", "FalconConfig", **TEXT), 2)
    with pytest.raises(TypeError, match=r"'net.transformer.h.0.mlp.dense_h_to_4h', got its subclass .*FalconLinear"):
        inject(within(hf("FalconForCausalLM", "FalconConfig", **TEXT)), 2, targets=("mlp",))


def test_standardised_convolutions_are_not_passed_over_in_silence():
    from timm.layers import StdConv2d

    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "std": StdConv2d(3, 4, 1)})
    with pytest.warns(UserWarning, match=r"1 StdConv2d \('std'\)"):
        inject(model, 2, convolutions=True)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_parametrised_layer_is_not_passed_over_in_silence(wrap):
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "own": wrap(nn.Linear(4, 4))})
    with pytest.warns(UserWarning, match=r"1 ParametrizedLinear \('own'"):
        inject(model, 2)
    assert list(glora_layers(model)) == ["plain"]


def test_a_model_of_convolutions_says_how_they_are_adapted():
    with pytest.raises(ValueError, match=r"found none; convolutions=True adapts its 20 nn.Conv2d; \['fc'\] is taken"):
        inject(torchvision.models.resnet18(), 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
        lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
        lambda layer: layer.register_buffer("scale", torch.ones(1)),
        lambda layer: layer.add_module("act", nn.ReLU()),
        lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(1))),
    ],
    ids=["state-dict-hook", "loading-hook", "buffer", "module", "parameter"],
)
def test_what_a_layer_has_beside_its_weight_is_not_lost(change):
    model = mlp()
    change(model.fc2)
    with unchanged(model), pytest.raises(TypeError, match=r"a weight and a bias alone .* lost \(layer 'fc2'\)"):
        inject(model, 2)


def test_hooks_are_refused_by_the_name_of_their_layer():
    model = mlp()
    model.fc2.register_forward_hook(lambda *_: None)
    with unchanged(model), pytest.raises(TypeError, match=r"hooks.*\(layer 'fc2'\)"):
        inject(model, 2)


# -- the summary --------------------------------------------------------------------------------------


def test_the_summary_counts_every_parameter_once():
    model = inject(tiny_vit(), 2)
    found = summary(model)
    layers = glora_layers(model)
    assert set(found.adapted) == set(layers)
    assert found.adapted["blocks.0.attn.qkv"] == ("GLoRALinear", 48, 16, 2)
    assert found.trained == {"head.weight": 48, "head.bias": 3}
    assert set(found.frozen) == {"cls_token", "pos_embed", "patch_embed.proj.weight"}
    assert "convolutions=True" in found.frozen["patch_embed.proj.weight"]
    assert found.support_values == sum(p.numel() for layer in layers.values() for p in layer.support_parameters())
    assert found.path_values == glora.count_parameters(model)
    matrices = [p for name, p in tiny_vit().named_parameters() if p.ndim >= 2]
    adapted = sum(layer.weight.numel() for layer in layers.values())
    assert found.coverage == pytest.approx(adapted / sum(p.numel() for p in matrices))


def test_the_summary_is_readable():
    text = str(summary(inject(tiny_vit(), 2)))
    for line in ("adapted: 8 layers", "  8 x GLoRALinear, rank 2", "trained in full: 51 values", "  head.weight: 48"):
        assert line in text
    assert max(map(len, text.splitlines())) < 200


def test_the_summary_of_a_plain_model_is_refused():
    with pytest.raises(ValueError, match=r"found none; call glora\.inject"):
        summary(mlp())


# -- it learns ------------------------------------------------------------------------------------------


def resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def efficientnet():
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [(1, 16, 16, 1), (4, 16, 24, 2), (4, 24, 32, 2), (4, 32, 48, 2)]
    settings = [MBConvConfig(expand, 3, stride, wide, out, 1) for expand, wide, out, stride in blocks]
    return EfficientNet(settings, dropout=0.0, num_classes=CLASSES, last_channel=64)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def text_task(classes_at):
    """The class is the token at one position."""
    gen = generator(3)
    y = torch.arange(60) % CLASSES
    x = torch.randint(10, 40, (60, 6), generator=gen)
    x[:, classes_at] = y + 1
    return x, y


def image_task(size):
    gen = generator(4)
    y = torch.arange(60) % CLASSES
    return torch.randn(CLASSES, 3, size, size, generator=gen)[y] + 0.3 * torch.randn(
        60, 3, size, size, generator=gen
    ), y


def outputs(model, x):
    found = model(x)
    found = getattr(found, "logits", found)
    return found if isinstance(found, tuple) else (found,)


def accuracy_after(model, x, y, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.003)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # statistics that follow in few steps
    with seeded():
        for step in range(steps):
            at = torch.arange(step * 20, step * 20 + 20) % len(x)
            sum(F.cross_entropy(out, y[at]) for out in outputs(model, x[at])).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            return float((outputs(model, x)[0].argmax(-1) == y).float().mean())


@pytest.mark.parametrize(
    ("make", "task", "convolutions", "targets", "heads"),
    [
        (
            lambda: hf("ViTForImageClassification", "ViTConfig", **IMAGE),
            lambda: image_task(16),
            False,
            ["q_proj", "v_proj"],
            ["classifier"],
        ),
        (deit, lambda: image_task(16), False, ["qkv"], ["head", "head_dist"]),
        slow(
            lambda: hf("BertForSequenceClassification", "BertConfig", **TEXT, num_labels=CLASSES),
            lambda: text_task(0),
            False,
            ["query", "value"],
            ["classifier"],
        ),
        slow(
            lambda: llama("LlamaForSequenceClassification", num_labels=CLASSES, pad_token_id=0),
            lambda: text_task(-1),
            False,
            ["q_proj", "v_proj"],
            ["score"],
        ),
        slow(resnet, lambda: image_task(16), True, ["conv1", "conv2"], ["fc"]),
        slow(
            lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES),
            lambda: image_task(32),
            True,
            r"features\.[2-9]\.block\.0\.0",
            ["classifier.3"],
        ),
        slow(efficientnet, lambda: image_task(32), True, r"features\.[2-4]\.0\.block\.0\.0", ["classifier"]),
    ],
    ids=["vit", "deit-distilled", "bert", "llama", "resnet", "mobilenetv3", "efficientnet"],
)
def test_learns_a_toy_task_as_lora_in_peft_does(make, task, convolutions, targets, heads):
    """With no other setting than convolutions=True; LoRA with modules_to_save. Within 2 points, or better."""
    peft = pytest.importorskip("peft")
    with seeded():
        ours = make()
    with seeded():
        theirs = make()
    before = {name: p.clone() for head in heads for name, p in ours.get_submodule(head).named_parameters(head)}
    x, y = task()
    steps = 60 if x.is_floating_point() else 150
    with seeded():
        inject(ours, 4, convolutions=convolutions)
    got = accuracy_after(ours, x, y, steps)
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=heads)
    expected = accuracy_after(peft.get_peft_model(theirs, config), x, y, steps)
    assert all(not torch.equal(ours.get_parameter(name), p) for name, p in before.items())
    assert expected > 0.8
    assert got >= expected - 0.02
