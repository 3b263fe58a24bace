"""GLoRA in transformers.Trainer: the paths and losses of glora.train, the bits of an uncut run, small checkpoints."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import glora
from glora import PathConfig, SearchSpace
from glora.dataset import joined
from glora.random_numbers import mix
from glora.trainer import ADAPTER, GLoRACallback, GLoRATrainer
from glora.training.batches import StepSampler
from tests.glora.hugging_face import Rows, images, llama, texts, vit
from tests.glora.toys import same_bits, state

SPACE = SearchSpace(ranks=(2,), bias_free=True)
STEPS, BATCH, SEED = 6, 4, 5


def adapted(make=llama, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return glora.inject(make(), 2, **options)


def arguments(folder, **options):
    return TrainingArguments(
        **{
            "output_dir": folder,
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-2,
            "weight_decay": 0.0,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": True,
            "seed": SEED,
            "max_grad_norm": 0.0,
            **options,
        }
    )


class Seen(TrainerCallback):
    """The path of every step; stops after one of them."""

    def __init__(self, stop=None):
        self.paths, self.stop = [], stop

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.paths.append(glora.get_paths(model))

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.stop


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model, folder, data=None, stop=None, resume=None, kind=GLoRATrainer, space=SPACE, **options):
    seen = Seen(stop)
    own = {"space": space} if kind is GLoRATrainer else {}
    callbacks = [seen] if kind is GLoRATrainer else [GLoRACallback(space), seen]
    trainer = kind(model, arguments(folder, **options), train_dataset=data or texts(), callbacks=callbacks, **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen.paths


class InTheOrderOfTrain(Rows):
    """The batches of glora.train, one after another, for a trainer that does not shuffle."""

    def __init__(self, rows):
        order = StepSampler(len(rows), BATCH, SEED, 0, STEPS)
        super().__init__([rows[index] for batch in order for index in batch])


class InOrder(GLoRATrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def pictures(dtype):
    return Rows([{"pixel_values": x.to(dtype), "labels": int(y)} for x, y in zip(*images())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [llama, vit])
def test_a_run_is_that_of_train(tmp_path, make, dtype):
    """On the same paths and batches: losses to 1e-6, and in fp64 every parameter.

    In fp32, AdamW makes whole steps of gradients that are nothing but rounding (a bias of the keys). Trainer logs fp32.
    """
    data = texts() if make is llama else pictures(dtype)
    ours, theirs = adapted(lambda: make().to(dtype)), adapted(lambda: make().to(dtype))
    recipe = glora.Recipe(steps=STEPS, batch_size=BATCH, lr=1e-2, weight_decay=0, warmup=0, seed=SEED)
    summary = glora.train(ours, data, recipe, space=SPACE, progress=False)
    seen = Seen()
    trainer = InOrder(theirs, arguments(tmp_path), train_dataset=InTheOrderOfTrain(data), space=SPACE, callbacks=[seen])
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[0] == pytest.approx(1e-2) and rates[-1] < 1e-3
    assert losses(trainer) == pytest.approx(summary.losses, abs=1e-6)
    if dtype is torch.float64:
        for name, tensor in state(ours).items():
            torch.testing.assert_close(state(theirs)[name], tensor, rtol=0, atol=1e-9, msg=name)
        assert not same_bits(state(ours), state(adapted(lambda: make().to(dtype))))
    generator = torch.Generator().manual_seed(mix(SEED, -1))
    assert seen.paths == [glora.sample_paths(theirs, SPACE, generator) for _ in range(STEPS)]


@pytest.mark.parametrize("kind", [GLoRATrainer, Trainer], ids=["GLoRATrainer", "callback"])
@pytest.mark.filterwarnings("ignore:save_pretrained:UserWarning", "ignore:load_state_dict:UserWarning")
def test_a_resumed_run_has_the_same_bits(tmp_path, kind):
    whole, paths = trained(adapted(), tmp_path / "whole", kind=kind)
    options = {"save_strategy": "steps", "save_steps": 2}
    _, before = trained(adapted(), tmp_path / "cut", stop=4, kind=kind, **options)
    resumed, after = trained(adapted(), tmp_path / "cut", resume=True, kind=kind, **options)
    assert before + after == paths and len(after) == 2
    assert same_bits(state(resumed.model), state(whole.model))
    assert losses(resumed) == losses(whole)


def test_a_checkpoint_holds_the_adapter_and_no_base(tmp_path):
    trainer, _ = trained(adapted(), tmp_path, save_strategy="steps", save_steps=3)
    folder = tmp_path / "checkpoint-3"
    files = {file.name for file in folder.iterdir()}
    assert ADAPTER in files and not files & {"model.safetensors", "pytorch_model.bin", "config.json"}
    last = glora.load_adapter(llama(), tmp_path / "checkpoint-6" / ADAPTER)
    tokens = torch.tensor([texts()[0]["input_ids"]])
    assert torch.equal(last(tokens).logits, trainer.model(tokens).logits)
    trainer.save_model(tmp_path / "own")
    assert same_bits(state(glora.load_adapter(llama(), tmp_path / "own" / ADAPTER)), state(trainer.model))


@pytest.mark.filterwarnings("ignore:save_pretrained:UserWarning")
def test_the_callback_saves_the_adapter_beside_the_model(tmp_path):
    trainer, _ = trained(adapted(), tmp_path, kind=Trainer, save_strategy="steps", save_steps=3)
    loaded = glora.load_adapter(llama(), tmp_path / "checkpoint-6" / ADAPTER)
    assert same_bits(state(loaded), state(trainer.model))
    assert glora.get_paths(loaded) == glora.get_paths(adapted())


def test_paths_are_as_before_and_the_log_has_their_size(tmp_path):
    model = adapted()
    glora.set_paths(model, PathConfig(B="lora_2"))
    trainer, paths = trained(model, tmp_path, logging_steps=2)
    assert set(glora.get_paths(model).values()) == {PathConfig(B="lora_2")}
    entries = [entry["glora_parameters"] for entry in trainer.state.log_history if "loss" in entry]
    counts = [glora.count_parameters(model, each) for each in paths]
    assert entries == [(a + b) / 2 for a, b in zip(counts[::2], counts[1::2])]


def test_evaluation_and_the_best_model_are_of_the_paths_before(tmp_path):
    model = adapted()
    glora.set_paths(model, PathConfig(A="vector", B="lora_2"))
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = GLoRATrainer(
        model,
        arguments(tmp_path, load_best_model_at_end=True, learning_rate=0.2, **options),
        train_dataset=texts(),
        eval_dataset=texts(8, ignored=False),
        space=SPACE,
    )
    trainer.train()
    shown = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert sorted(shown) == [2, 4, 6] and len(set(shown.values())) == 3
    for step, loss in shown.items():
        loaded = glora.load_adapter(llama(), tmp_path / f"checkpoint-{step}" / ADAPTER)
        assert glora.evaluate(loaded, texts(8, ignored=False)).loss == pytest.approx(loss, rel=1e-5)
    best = min(shown, key=shown.get)
    assert trainer.state.best_model_checkpoint.endswith(f"-{best}")
    assert same_bits(state(model), state(glora.load_adapter(llama(), tmp_path / f"checkpoint-{best}" / ADAPTER)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    whole, paths = trained(adapted(), tmp_path / "plain")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    saving, others = trained(adapted(), tmp_path / "saving", **options)
    assert paths == others
    assert losses(saving) == pytest.approx(losses(whole), abs=1e-6)


def test_accumulation_shares_a_path_and_gives_the_gradients_of_the_whole_batch(tmp_path):
    whole, paths = trained(adapted(), tmp_path / "whole")
    parts, others = trained(
        adapted(), tmp_path / "parts", per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2
    )
    assert paths == others and len(paths) == STEPS
    for name, tensor in state(whole.model).items():
        torch.testing.assert_close(state(parts.model)[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_bf16(tmp_path):
    whole, _ = trained(adapted(), tmp_path / "whole")
    half, _ = trained(adapted(), tmp_path / "half", bf16=True)
    assert losses(half) == pytest.approx(losses(whole), rel=2e-2)
    assert losses(half) != losses(whole)


def test_without_a_space_the_path_stays(tmp_path):
    model = adapted()
    glora.set_paths(model, PathConfig(B="lora_2"))
    _, paths = trained(model, tmp_path, space=None)
    assert {path for each in paths for path in each.values()} == {PathConfig(B="lora_2")}
    unread = [layer.Ad for layer in glora.glora_layers(model).values()]
    assert not any(bool(each.any()) for each in unread)


def four_bits():
    """A LLaMA whose decoder layers are in 4 bits, marked as Transformers marks what it has quantised."""
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
                    packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, packed.to("cpu"))
    model.is_quantized, model.is_loaded_in_4bit = True, True
    model.quantization_method = "bitsandbytes"
    model.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
    return model


def test_a_base_in_4_bits(tmp_path):
    plain = adapted(four_bits)
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(plain, arguments(tmp_path / "plain"), train_dataset=texts())
    options = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = trained(adapted(four_bits), tmp_path / "whole", **options)
    assert not whole.model._hf_peft_config_loaded
    assert losses(whole)[-1] != losses(whole)[0]
    trained(adapted(four_bits), tmp_path / "cut", stop=4, **options)
    resumed, _ = trained(adapted(four_bits), tmp_path / "cut", resume=True, **options)
    assert losses(resumed) == losses(whole)
    parameters = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (llama, {}, ValueError, "at least one adapted layer"),
        (adapted, {"space": SearchSpace(ranks=(4,))}, ValueError, r"^space: expected ranks up to 2"),
        (adapted, {"space": 3}, TypeError, r"^space: expected a glora.SearchSpace or None, got int"),
        (adapted, {"path_seed": -1}, ValueError, r"^seed: expected an integer from 0, got -1"),
        (lambda: adapted().requires_grad_(False), {"space": SPACE}, ValueError, "^model: expected .* require grad"),
    ],
)
def test_refusals(tmp_path, make, options, error, message):
    with pytest.raises(error, match=message):
        GLoRATrainer(make(), arguments(tmp_path), train_dataset=texts(), **options).train()


def test_refuses_what_would_train_nothing(tmp_path):
    model = adapted(heads=())
    glora.set_paths(model, PathConfig())
    with pytest.raises(ValueError, match=r"^model: expected paths that read a support tensor"):
        GLoRATrainer(model, arguments(tmp_path), train_dataset=texts())


TWO_PROCESSES = """
import json, sys
import torch
from tests.glora.test_trainer import GLoRATrainer, SPACE, accelerated, adapted, arguments, losses, state, texts
folder, batch, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model = adapted()
trainer = GLoRATrainer(
    model,
    arguments(folder, per_device_train_batch_size=batch, save_strategy="steps", save_steps=3, **options),
    train_dataset=texts(ignored=False), space=SPACE,
)
trainer.train()
loops = [] if options else [state(accelerated(batch, wrapped)) for wrapped in (False, True)]
if trainer.is_world_process_zero():
    torch.save([state(model), *loops], folder + "/states.pt")
    json.dump(losses(trainer), open(folder + "/losses.json", "w"))
"""


def accelerated(batch, wrapped):
    """A loop with accelerate: the model plain, and its gradients averaged by sync_gradients, or prepared as well."""
    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = accelerate.Accelerator(cpu=True, kwargs_handlers=[unused])
    model = adapted()
    optimizer = torch.optim.SGD(glora.trainable_parameters(model), lr=0.5)
    loader = DataLoader(texts(ignored=False), batch, collate_fn=joined)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    called = accelerator.prepare(model) if wrapped else model
    generator = torch.Generator().manual_seed(0)
    for batch in loader:
        glora.set_paths(model, glora.sample_paths(model, SPACE, generator))
        accelerator.backward(called(**batch).loss)
        if not wrapped:
            glora.sync_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return model


def launched(folder, processes, batch, **options):
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(TWO_PROCESSES)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(folder), str(batch), json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        env={**__import__("os").environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "states.pt"), json.loads((folder / "losses.json").read_text())


CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def test_two_processes_train_as_one(tmp_path):
    """Over gloo, with the same paths on both: Trainer, which makes DistributedDataParallel, and accelerate's loops."""
    one, one_losses = launched(tmp_path / "one", 1, BATCH)
    for name, options in {"two": {}, "saving": {**CHECKPOINTING, "ddp_find_unused_parameters": True}}.items():
        two, two_losses = launched(tmp_path / name, 2, BATCH // 2, **options)
        assert two_losses == pytest.approx(one_losses, abs=1e-5)
        for found, expected in zip(two, one):
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-4, msg=key)
        assert len(two) == (3 if name == "two" else 1)
        assert (tmp_path / name / "checkpoint-6" / ADAPTER).is_file()


@pytest.mark.parametrize(
    ("found", "checkpointing", "processes", "path", "refused"),
    [
        (None, False, 2, PathConfig(B="lora_2"), False),
        (None, True, 2, PathConfig(B="lora_2"), True),
        (True, True, 2, PathConfig(B="lora_2"), False),
        (False, False, 2, PathConfig(B="lora_2"), True),
        (False, False, 1, PathConfig(B="lora_2"), False),
        (False, False, 2, PathConfig("lora_2", "lora_2", "lora_2", "vector", "vector"), False),
    ],
)
def test_a_wrapper_that_would_train_wrongly_is_refused(found, checkpointing, processes, path, refused):
    model = adapted(vit)
    glora.set_paths(model, path)
    names = ("ddp_find_unused_parameters", "gradient_checkpointing", "world_size")
    args = SimpleNamespace(**dict(zip(names, (found, checkpointing, processes))), seed=0)
    message = r"^args.ddp_find_unused_parameters: expected True"
    with pytest.raises(ValueError, match=message) if refused else nullcontext():
        GLoRACallback().on_train_begin(args, SimpleNamespace(global_step=0), None, model=model)


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^args: expected transformers.TrainingArguments or None, got dict"):
        GLoRATrainer(adapted(), {"output_dir": tmp_path}, train_dataset=texts())


BEFORE = PathConfig(B="lora_2")


class Failing(TrainerCallback):
    """Raises within one step, once."""

    def __init__(self, error, step=2):
        self.errors, self.step = [error], step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.errors:
            raise self.errors.pop()


def paths_in(model):
    return set(glora.get_paths(model).values())


def made(kind, model, folder, callbacks=(), **options):
    """A trainer over SPACE, with ``callbacks`` after the others."""
    glora.set_paths(model, BEFORE)
    if kind is Trainer:
        options["callbacks"] = [GLoRACallback(SPACE)]
    else:
        options["space"] = SPACE
    given = arguments(folder, **options.pop("arguments", {}))
    trainer = kind(model, given, train_dataset=texts(), eval_dataset=texts(8, ignored=False), **options)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize("kind", [GLoRATrainer, Trainer], ids=["GLoRATrainer", "callback"])
def test_an_exception_in_a_step_does_not_lose_the_paths_before(tmp_path, kind):
    model = adapted()
    trainer = made(kind, model, tmp_path, [Failing(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (paths_in(model) == {BEFORE}) is (kind is GLoRATrainer)
    trainer.train()
    assert paths_in(model) == {BEFORE}


def test_paths_set_after_an_exception_stay(tmp_path):
    other = PathConfig(A="vector")
    trainer = made(Trainer, model := adapted(), tmp_path, [Failing(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    glora.set_paths(model, other)
    trainer.train()
    assert paths_in(model) == {other}


@pytest.mark.parametrize("kind", [GLoRATrainer, Trainer], ids=["GLoRATrainer", "callback"])
def test_a_batch_size_that_is_found(tmp_path, kind):
    error = RuntimeError("CUDA out of memory. Tried to allocate")
    options = {"auto_find_batch_size": True}
    trainer = made(kind, model := adapted(), tmp_path, [failing := Failing(error)], arguments=options)
    trainer.train()
    assert not failing.errors and trainer.state.global_step == STEPS
    assert paths_in(model) == {BEFORE}


class Watching(TrainerCallback):
    """The paths of every evaluation, and what callbacks of loggers get."""

    def __init__(self):
        self.paths, self.logs = [], []

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.paths.append(paths_in(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", [GLoRATrainer, Trainer], ids=["GLoRATrainer", "callback"])
def test_every_evaluation_is_of_the_paths_before(tmp_path, kind, accumulated):
    options = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": accumulated}
    trainer = made(kind, adapted(), tmp_path, [watching := Watching()], arguments=options)
    trainer.train()
    assert watching.paths and all(paths == {BEFORE} for paths in watching.paths)


class Saving(TrainerCallback):
    """Saves within a step, as callbacks do that are told of the end of a job."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.save_model(self.folder)


def test_what_is_saved_within_a_step_has_the_paths_before(tmp_path):
    trainer = made(GLoRATrainer, adapted(), tmp_path, [saving := Saving()])
    saving.trainer, saving.folder = trainer, tmp_path / "own"
    trainer.train()
    assert paths_in(glora.load_adapter(llama(), tmp_path / "own" / ADAPTER)) == {BEFORE}


def test_loggers_get_the_size_of_the_paths(tmp_path):
    """GLoRATrainer's own callback comes after them."""
    trainer = GLoRATrainer(
        adapted(), arguments(tmp_path), train_dataset=texts(), space=SPACE, callbacks=[watching := Watching()]
    )
    trainer.train()
    sizes = [logs["glora_parameters"] for logs in watching.logs if "loss" in logs]
    assert len(sizes) == STEPS
    assert sizes == [entry["glora_parameters"] for entry in trainer.state.log_history if "loss" in entry]
    assert not any("glora_parameters" in logs for logs in watching.logs if "loss" not in logs)


def test_the_bare_callback_adds_the_size_to_the_history(tmp_path):
    trainer = made(Trainer, adapted(), tmp_path)
    trainer.train()
    assert all(entry["glora_parameters"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_a_function_that_makes_the_model(tmp_path):
    options = {"args": arguments(tmp_path), "train_dataset": texts(), "space": SPACE}
    trainer = GLoRATrainer(model_init=lambda: adapted(llama), **options)
    trainer.train()
    assert losses(trainer) == losses(trained(adapted(), tmp_path)[0])
    trainer.train()
    assert paths_in(trainer.model) == paths_in(adapted())
    with pytest.raises(ValueError, match="at least one adapted layer"):
        GLoRATrainer(model_init=lambda: llama().train(), **options).train()


def test_a_space_trains_what_the_paths_before_leave_out(tmp_path):
    model = adapted(heads=())
    glora.set_paths(model, PathConfig())
    trained(model, tmp_path)
    assert paths_in(model) == {PathConfig()}
    assert any(bool(layer.Bd.any()) for layer in glora.glora_layers(model).values())
