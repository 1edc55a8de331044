"""A CPU's instruction sets: a new one is a header and a row, and must give every hook."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from int8fx.kernels.cpu import build

FOLDER = build.SOURCE.parent
PORTABLE = (FOLDER / "isa" / "portable.h").read_text()
HOOKS = sorted(set(re.findall(r"\bI::(\w+)", (FOLDER / "isa" / "hooks.h").read_text())))
# Hooks of limbs.h and of weight_only.h, which the portable instruction set has elsewhere or not at all.
ELSEWHERE = {"limb_quads", "Element", "store_w", "channel_of"}
OF_VECTORS = {"Floats", "Ints", "Words"}  # defined for every instruction set in vectors.h


def errors_of(code: str, folder: Path) -> str:
    """What the compiler says about a translation unit, but for warnings."""
    source = folder / "unit.cpp"
    source.write_text(code)
    includes = [f"-isystem{path}" for path in include_paths()]
    command = [*build.find_compiler(), *build.FLAGS, "-fsyntax-only", *includes, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.fixture
def sources(tmp_path):
    """A copy of the C++ sources to edit."""
    return Path(shutil.copytree(FOLDER, tmp_path / "cpu"))


def test_a_new_one_is_a_header_and_a_row(sources):
    header = PORTABLE.replace("int8fx::portable", "int8fx::newcomer").replace("MR = 4", "MR = 3")
    (sources / "isa" / "newcomer.h").write_text(header)
    table = sources / "isa" / "table.h"
    row = "    INT8FX_KERNEL(portable),\n"
    assert row in table.read_text()
    included = table.read_text().replace(
        '#include "portable.h"', '#include "portable.h"\n#include "newcomer.h"'
    )
    table.write_text(included.replace(row, "    INT8FX_KERNEL(newcomer),\n" + row))
    code = """#include "isa/table.h"
    #include <string_view>
    constexpr auto last_but_one = int8fx::KERNELS[std::size(int8fx::KERNELS) - 2];
    static_assert(last_but_one.name == std::string_view("newcomer"));
    static_assert(last_but_one.int8.mr == 3);
    """
    assert errors_of(code, sources) == ""


@pytest.mark.parametrize("hook", ["load_half", "first_sums", "leave"])
def test_a_missing_hook_is_an_error_that_names_it(hook, sources):
    header = re.sub(rf"\b{hook}\b", f"another_{hook}", PORTABLE)
    (sources / "isa" / "portable.h").write_text(header)
    errors = errors_of('#include "isa/portable.h"\n', sources)
    assert "isa/hooks.h lists what" in errors
    assert f"I::{hook}" in errors


def test_a_hook_of_another_type_is_an_error(sources):
    wrong = PORTABLE.replace("static Ints to_ints(Floats v) {", "static Words to_ints(Floats v) {")
    assert wrong != PORTABLE
    (sources / "isa" / "portable.h").write_text(wrong)
    errors = errors_of('#include "isa/portable.h"\n', sources)
    assert "isa/hooks.h lists what an instruction set must give" in errors and "to_ints" in errors


def test_every_hook_of_the_list_is_asked_for(sources):
    """One translation unit with an instruction set for each hook, which lacks that one alone."""
    named = [hook for hook in HOOKS if hook not in ELSEWHERE | OF_VECTORS]
    assert len(named) > 20
    hooks = PORTABLE[PORTABLE.index("constexpr int LANES") : PORTABLE.index('#include "../dot.h"')]
    hooks = hooks.replace('#include "../vectors.h"', '#include "vectors.h"')
    complete = "int8fx::InstructionSet<Isa> && int8fx::HasDotHooks<Isa>"
    code = '#include "isa/hooks.h"\n'
    code += f"namespace int8fx::whole {{ {hooks}\nstatic_assert({complete}); }}\n"
    for hook in named:
        without = re.sub(rf"\b{hook}\b", f"another_{hook}", hooks)
        assert without != hooks, hook
        code += f"namespace int8fx::without_{hook} {{ {without}\n"
        code += f'static_assert(!({complete}), "{hook}"); }}\n'
    assert errors_of(code, sources) == ""
