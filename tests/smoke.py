"""A user's first hour, where nothing is installed but the package and what it requires itself.

``.ci/run`` builds the package, installs the wheel in a new virtual environment and runs this there:

    python -I tests/smoke.py

Nothing but the standard library and the package's own requirements may be imported here.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import lora_inject
from lora_inject import (
    LoRAInjectError,
    inject,
    inspect,
    load,
    lora_parameters,
    merge,
    plan,
    report,
    save,
    strip,
    unmerge,
)

X = torch.linspace(-1, 1, 48).view(3, 16)
TARGETS = ["0", "2"]


def base():
    """The same small model each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def trained():
    """The model with an adapter that has trained for a step."""
    model = base()
    inject(model, TARGETS, r=2)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()
    return model


def the_package_is_the_installed_one():
    clone = Path(__file__).resolve().parents[1]
    assert clone not in Path(lora_inject.__file__).resolve().parents
    assert (Path(lora_inject.__file__).parent / "py.typed").is_file()


def a_step_trains_the_adapter_alone():
    model, before = trained(), base().state_dict()
    assert not torch.equal(model(X), base()(X))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert "128 of 672 parameters train" in str(report(model)), report(model)


def every_format_comes_back():
    model = trained()
    files = {"peft": "peft", "diffusers": "diffusers", "loralib": "a.pt", "kohya": "a.safetensors"}
    for name, path in files.items():
        save(model, path, format=name)
        other = base()
        load(other, path, alpha=2 if name == "loralib" else None)
        assert torch.equal(other(X), model(X)), name


def another_process_loads_what_was_saved():
    save(trained(), "kept")
    here = str(Path(__file__).resolve().parent)
    code = f"import sys; sys.path.append({here!r}); import smoke; m = smoke.base(); "
    code += "smoke.load(m, 'kept'); print(smoke.torch.equal(m(smoke.X), smoke.trained()(smoke.X)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done


def what_is_printed_is_short_or_a_table():
    model = base()
    shown = (plan(model, TARGETS, r=2), inject(model, TARGETS, r=2), inspect("kept"))
    assert all(repr(one).count("\n") == 0 and len(repr(one)) < 200 for one in shown[:2]), shown
    assert all("<table>" in one._repr_html_() and "───" in str(one) for one in shown), shown


def _error_of(call, model):
    try:
        call(model)
    except LoRAInjectError as error:
        return str(error)
    return "no error"


def mistakes_are_said_before_anything_has_changed():
    for call, said in (
        (lambda m: inject(m, "1_proj"), "Names that can be adapted"),
        (lambda m: inject(m, "0|2"), "re:"),
        (lambda m: inject(m, TARGETS, 8), "r=8"),
        (lambda m: inject(m, target_modules=["0"], lora_alpha=16), "Here it is targets"),
        (lambda m: inject(m, TARGETS, r="8"), "r must be an integer"),
        (lambda m: inject("0", m), "The model comes first"),
        (lambda m: save(m, "nothing"), "Call inject first"),
        (lambda m: merge(m), "Call inject first"),
        (lambda m: load(m, "nowhere"), "no file or directory"),
        (lambda m: load(m, "."), "holds no adapter"),
        (lambda m: load(m, "kept/adapter_config.json"), "Give the directory"),
        (lambda m: load(m[0], "kept"), "another model"),
    ):
        model, before = base(), str(base())
        assert said in _error_of(call, model)
        assert str(model) == before
        assert all(p.requires_grad for p in model.parameters())


def merging_and_stripping_are_undone_to_the_bit():
    model, before = trained(), base()
    y = model(X)
    merge(model)
    torch.testing.assert_close(model(X), y)
    unmerge(model)
    assert torch.equal(model(X), y)
    strip(model)
    assert torch.equal(model(X), before(X))
    assert list(model.state_dict()) == list(before.state_dict())


def the_command_line_plans_inspects_and_converts():
    Path("of_mine.py").write_text("import torch\n\nbuild = lambda: torch.nn.Linear(9, 9)\n")
    command = [sys.executable, "-m", "lora_inject"]
    for arguments, shown in {
        ("plan", "of_mine:build", "-r", "2"): "36 of 126 parameters train",
        ("inspect", "peft"): "PEFT",
        ("convert", "peft", "again.pt", "--to", "loralib"): "loralib",
        ("convert", "peft", "again", "--to", "diffusers"): "diffusers",
    }.items():
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout, done.stdout
    for arguments, said in {
        ("plan", "nowhere"): "no file or directory",
        ("plan", "of_mine:build", "--targets", "x"): "matches nothing",
        ("inspect", "."): "holds no adapter",
        ("convert", "again.pt", "more", "--to", "peft"): "--alpha 16",
        ("audit", "peft"): "no package.module:callable",
        ("capacity",): "invalid choice",
    }.items():
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert said in done.stderr.splitlines()[-1], done.stderr


def what_needs_more_says_what():
    command = [sys.executable, "-m", "lora_inject", "demo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr, done.stderr
    assert "pip install" in done.stderr, done.stderr


STEPS = (
    the_package_is_the_installed_one,
    a_step_trains_the_adapter_alone,
    every_format_comes_back,
    another_process_loads_what_was_saved,
    what_is_printed_is_short_or_a_table,
    mistakes_are_said_before_anything_has_changed,
    merging_and_stripping_are_undone_to_the_bit,
    the_command_line_plans_inspects_and_converts,
    what_needs_more_says_what,
)


def main():
    """Run every step in a folder of its own; the first that fails ends it."""
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for step in STEPS:
            step()
            print(f"ok: {step.__name__.replace('_', ' ')}")
        os.chdir("/")


if __name__ == "__main__":
    main()
