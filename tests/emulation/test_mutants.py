"""Bugs planted in copies of the CUDA kernels' sources are found."""

from __future__ import annotations

import multiprocessing
import re
import shutil
from pathlib import Path

import emulated
import pytest
from kernel_cases import CHECKS
from mutants import KINDS, MUTANTS, Mutant

# A mutant may never end, or end the process.
SECONDS = 120


def sources(mutant: Mutant, folder: Path) -> list[Path]:
    """What the mutant's operation is made of; Hopper's falls back to the portable one."""
    op = "fprop" if mutant.op == "conv" else mutant.op
    if op in ("fprop", "dgrad"):
        names = [f"{op}.cu"] if mutant.path == "portable" else ["hopper_row_products.cu", "fprop.cu", "dgrad.cu"]
    else:
        own = [f"{op}.cu"] if mutant.path == "portable" else ["hopper_column_products.cu", "gram.cu", "wgrad.cu"]
        names = [*own, "combine.cu"]
    return [folder / "cuda" / name for name in names]


def plant(mutant: Mutant, folder: Path) -> None:
    """Makes a copy of the kernels with the bug."""
    shutil.copytree(emulated.PROJECTION / "cuda", folder / "cuda")
    shutil.copy(emulated.PROJECTION / "projection.h", folder)
    file = folder / "cuda" / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} times:\n{mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new))


def first_failure(library: Path, mutant: Mutant) -> str | None:
    """What the first of the mutant's cases that fails says, in a process of its own; None when none does."""
    choose, check = CHECKS[mutant.check]

    def run(sender):
        kernels = emulated.Kernels(library)
        for case in choose(mutant.op, mutant.path):
            try:
                check(kernels, case)
            except (AssertionError, emulated.EmulationError) as error:
                sender.send(str(error))
                return
        sender.send(None)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else f"nothing within {SECONDS} seconds"
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()


def pytest_generate_tests(metafunc):
    if "mutant" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-mutants")
        chosen = [mutant for mutant in MUTANTS if mutant.quick or every]
        metafunc.parametrize("mutant", chosen, ids=[mutant.name.replace(" ", "-") for mutant in chosen])


@pytest.fixture(scope="session")
def libraries(builder, tmp_path_factory, request) -> dict[Mutant, Path | AssertionError]:
    """The library of each mutant that is tested, all compiled at once, or why it cannot be planted."""
    chosen = [item.callspec.params["mutant"] for item in request.session.items if item.originalname == "test_mutant"]
    folders, made = {}, {}
    for number, mutant in enumerate(chosen):
        folder = tmp_path_factory.getbasetemp() / "mutants" / str(number)
        try:
            plant(mutant, folder)
            folders[mutant] = folder
        except AssertionError as error:
            made[mutant] = error
    built = builder.libraries(
        [([*emulated.MACHINE, *sources(mutant, folder)], folder) for mutant, folder in folders.items()]
    )
    return made | dict(zip(folders, built, strict=True))


def test_mutant(libraries, mutant):
    library = libraries[mutant]
    if isinstance(library, AssertionError):
        raise library
    found = first_failure(library, mutant)
    assert found is not None, "not found"
    assert re.search(KINDS[mutant.kind], found), f"found, but otherwise than as {mutant.kind}: {found}"


def test_table():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert sum(mutant.quick for mutant in MUTANTS) == 6


def test_a_text_that_is_not_in_the_source_is_an_error(tmp_path):
    mutant = Mutant("none", "values", "no such text", "", "tiles.cuh", "fprop")
    with pytest.raises(AssertionError, match="tiles.cuh has 0 times"):
        plant(mutant, tmp_path / "projection")
