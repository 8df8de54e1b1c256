"""Templates, host defaults, several documents, jinja2, explain: where a domain's keys come from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from docblocks import ROOT, blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.cli.app import main
from xtool.config.explain import HIDDEN, explain
from xtool.config.load import PLAIN, Inputs, Loaded, load_all, load_config
from xtool.config.problems import problems_of
from xtool.errors import ConfigError, UsageError

MIB = 1 << 20
RELAXED = settings(deadline=None)
PVH = "name: web\ntype: pvh\nmemory: 64\nkernel: vmlinuz\n"
Files = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOOL_ETC_DIR", str(tmp_path / "etc"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """``files(name=text, ...)`` writes them; the path of the first."""

    def write(texts: dict[str, str]) -> Path:
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / next(iter(texts))

    return write


def one(path: Path, *sets: str, **inputs: tuple[str, ...]) -> Loaded:
    (loaded,) = load_all(path, Inputs(sets, **inputs))  # type: ignore[arg-type]
    return loaded


def problems(path: Path, *sets: str) -> list[ConfigError]:
    with pytest.raises(ConfigError) as caught:
        load_all(path, Inputs(sets))
    return list(problems_of(caught.value))


# --- layers ---------------------------------------------------------------------------------------------
def test_maps_merge_and_everything_else_is_replaced(files: Files) -> None:
    path = files(
        {
            "web.yaml": "extends: [base.yaml, big]\nname: web\ndisk: [{vdev: xvdb, target: /b}]\n"
            "cloud_init: {meta_data: {a: b}}\n",
            "base.yaml": "type: pvh\nmemory: 64\nvcpus: 2\nkernel: k\ndisk: ['/a,raw,xvda', '/c,raw,xvdc']\n"
            "cloud_init: {user_data: {x: 1}, vdev: xvdy}\n",
            "home/xtool/templates/big.yaml": "memory: 128\n",
            "etc/templates/big.yaml": "memory: 256\nvcpus: 9\n",
        }
    )
    config = one(path).config
    assert (config.memory, config.vcpus) == (128 * MIB, 2)  # the user's template hides the host's
    assert [disk.target for disk in config.disks] == ["/b"]
    assert config.cloud_init is not None
    assert config.cloud_init.vdev == "xvdy" and "x: 1" in config.cloud_init.user_data
    assert "a: b" in config.cloud_init.meta_data


def test_from_weak_to_strong(files: Files) -> None:
    texts = {
        "web.yaml": "extends: base.yaml\nname: web\n",
        "base.yaml": "extends: deep/root.yaml\ntype: pvh\nmemory: 3\n",
        "deep/root.yaml": "kernel: k\nmemory: 2\n",
        "home/xtool/defaults.yaml": "memory: 1\nvcpus: 3\n",
        "etc/defaults.yaml": "memory: 9\nvcpus: 4\nmaxvcpus: 8\n",
    }
    path = files(texts)
    loaded = one(path)
    config = loaded.config
    assert (config.memory, config.vcpus, config.maxvcpus) == (3 * MIB, 3, 8)
    assert config.kernel == str(path.parent / "deep" / "k")  # relative to the file that says it
    assert one(path, "memory=7").config.memory == 7 * MIB
    assert one(files({"web.yaml": "extends: base.yaml\nname: web\nmemory: 5\n"})).config.memory == 5 * MIB
    assert load_all(path, Inputs(defaults=False))[0].config.vcpus == 1


def test_an_empty_value_takes_away(files: Files) -> None:
    path = files(
        {
            "web.yaml": "extends: base.yaml\nname: web\nramdisk: ~\nvcpus:\n",
            "base.yaml": PVH + "ramdisk: r\nvcpus: 4\n",
        }
    )
    config = one(path).config
    assert config.ramdisk is None and config.vcpus == 1
    (problem,) = problems(files({"web.yaml": PVH + "ramdisk: ~\n"}))
    assert problem.message == "ramdisk has no value"


def test_defaults_are_for_all_guests(files: Files) -> None:
    """What is not for this guest's type is left out; a template's would be an error."""
    path = files({"web.yaml": PVH, "etc/defaults.yaml": "vga: stdvga\non_crash: preserve\nboot: c\n"})
    assert one(path).config.on_crash == "preserve"
    path = files({"web.yaml": "extends: b.yaml\nname: w\n", "b.yaml": PVH + "vga: stdvga\n"})
    (problem,) = problems(path)
    assert (problem.file, problem.line) == (str(path.parent / "b.yaml"), 5)
    assert "vga has no effect" in problem.message
    files({"etc/defaults.yaml": "name: x\n"})
    assert "cannot be a default" in problems(path)[0].message


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("extends: nope.yaml\n", 1, "there is no file", "relative"),
        ("extends: bigg\n", 1, "no template bigg", "did you mean big?"),
        ("extends: other\n", 1, "no template other", "base.yaml"),
        ("extends: {a: b}\n", 1, "the name or path of a template", ""),
        ("extends: ['']\n", 1, "the name or path of a template", ""),
        ("extends: loop.yaml\n", 1, "extends itself", ""),
        ("extends: two.yaml\n", 3, "one document", ""),
        ("extends: list.yaml\n", 1, "no map of keys", ""),
    ],
)
def test_wrong_templates(files: Files, text: str, line: int, message: str, hint: str) -> None:
    path = files(
        {
            "web.yaml": text + PVH,
            "etc/templates/big.yaml": "memory: 256\n",
            "loop.yaml": "extends: loop.yaml\n",
            "two.yaml": "vcpus: 1\n---\nvcpus: 2\n",
            "list.yaml": "- a\n",
        }
    )
    (problem,) = problems(path)
    assert message in problem.message and problem.line == line and hint in (problem.hint or "")


def test_problems_point_into_the_file_that_has_them(files: Files) -> None:
    path = files(
        {"web.yaml": "extends: b.yaml\nname: web\nvcpus: x\n", "b.yaml": "type: pvh\nmemroy: 5\nkernel: k\n"}
    )
    found = [(Path(p.file).name, p.line, p.key) for p in problems(path)]
    assert found == [("b.yaml", 2, "memroy"), ("web.yaml", 3, "vcpus")]  # and no "memory is missing"


# --- documents ------------------------------------------------------------------------------------------
def test_several_documents(files: Files) -> None:
    text = PVH + "---\n" + PVH.replace("web", "db").replace("64", "128") + "---\n# nothing\n"
    path = files({"all.yaml": text})
    assert [each.config.name for each in load_all(path)] == ["web", "db"]
    assert [each.config.memory for each in load_all(path, only="db")] == [128 * MIB]
    with pytest.raises(ConfigError, match="one domain is wanted here, this file has 2: web, db"):
        load_config(path)
    with pytest.raises(ConfigError, match="no domain 'dbb'") as caught:
        load_all(path, only="dbb")
    assert caught.value.hint == "did you mean db?"
    twice = problems(files({"all.yaml": PVH + "---\n" + PVH}))
    assert [(p.line, p.message) for p in twice] == [(6, "the name web is used twice")]


def test_all_documents_are_checked(files: Files) -> None:
    path = files({"all.yaml": PVH + "foo: 1\n---\n" + PVH.replace("web", "db") + "bar: 1\n"})
    assert [(p.line, p.message) for p in problems(path)] == [(5, "unknown key foo"), (11, "unknown key bar")]


# --- jinja2 ---------------------------------------------------------------------------------------------
def test_variables(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "there")
    path = files(
        {
            "web.yaml": "name: {{ name }}\ntype: pvh\nmemory: {{ size * 2 }}\nkernel: /{{ env.HERE }}\n"
            "localtime: {{ clock }}\nvif:\n{% for b in bridges %}\n  - {bridge: {{ b }}}\n{% endfor %}\n",
            "a.yaml": "size: 1\nbridges: [x, y]\nclock: true\n",
            "b.yaml": "size: 32\n",
        }
    )
    vars_files = (str(path.parent / "a.yaml"), str(path.parent / "b.yaml"))
    (loaded,) = load_all(path, Inputs(["name=web"], vars_files))
    config = loaded.config
    assert (config.name, config.memory, config.kernel) == ("web", 64 * MIB, "/there")
    assert [vif.bridge for vif in config.vifs] == ["x", "y"] and config.localtime
    (loaded,) = load_all(path, Inputs(["name=web", "size=40", "vcpus=3"], vars_files))
    assert (loaded.config.memory, loaded.config.vcpus) == (80 * MIB, 3)


@pytest.mark.parametrize(
    ("text", "line", "column", "message", "hint"),
    [
        (PVH + "vcpus: {{ n }}\n", 5, 8, "'n' is undefined", "--set"),
        (PVH + "vcpus: {{ nam }}\n", 5, 8, "'nam' is undefined", "did you mean name?"),
        (PVH + "{# x\n #}\nvcpus: {{ 'x' }}\n", 7, 8, "vcpus: a number is wanted", ""),
        (PVH + "{% if true %}\nfoo: 1\n{% endif %}\n", 6, 1, "unknown key foo", ""),
        (PVH + "{%- if true %}\n\n\nfoo: 1\n{% endif -%}\n", 8, 1, "unknown key foo", ""),
        (PVH + "{% for i in [1] %}\n{% for j in [1] %}\nvcpus: {{ i }}x\n{% endfor %}{% endfor %}\n",
         7, 8, "vcpus", ""),
        (PVH + "{{ 'a: 1\\nb: 2\\n' }}\n", 5, 1, "unknown key b", ""),
        (PVH + "extra: {{ 'x' }} y\nvcpus: zz # {{ 1 }}\n", 6, 8, "vcpus: a number", ""),
        (PVH + "disk: ['/a,raw,{{ 'xvda' }},rq']\n", 5, 8, "'rq' is not one of", ""),
        (PVH + "vcpus: {{ 1\n", 5, 1, "jinja2", "raw"),
        (PVH + "{% if x %}\n", 5, 1, "jinja2: Unexpected end of template", ""),
        (PVH + "{% fro %}\n", 5, 1, "Encountered unknown tag 'fro'", ""),
        (PVH + "{% include 'x' %}\n", 5, 1, "jinja2", ""),
        (PVH + "extra: {{ ''.__class__.__mro__ }}\n", 5, 8, "unsafe", ""),
        (PVH + "extra: {{ 'a' * 100000000 }}\n", 5, 8, "too often", ""),
        (PVH + "extra: {{ 9 ** 99999 }}\n", 5, 8, "too large", ""),
        (PVH + "extra: {{ range(999999999) | list }}\n", 5, 8, "jinja2", ""),
        (PVH + "extra: {{ 1 / 0 }}\n", 5, 8, "division by zero", ""),
        (PVH + "a: {{ 1 }}\n\t- x\n", 6, 1, "not valid YAML", ""),
        (PVH + "{% for a in range(90000) %}{% for b in range(90000) %}xxxxxxxxxxxx{% endfor %}{% endfor %}",
         1, 1, "renders to more", ""),
    ],
)  # fmt: skip
def test_a_template_s_mistakes_have_their_original_place(
    files: Files, text: str, line: int, column: int, message: str, hint: str
) -> None:
    found = [p for p in problems(files({"web.yaml": text}), "name=web") if message in p.message]
    assert found, [p.message for p in problems(files({"web.yaml": text}), "name=web")]
    assert (found[0].line, found[0].column) == (line, column)
    assert found[0].source == (text.split("\n")[line - 1] if line <= text.count("\n") + 1 else None)
    assert hint in (found[0].hint or "")


def test_literal_braces(files: Files) -> None:
    for written in ("{{ '{{' }} x }}", "{% raw %}{{ x }}{% endraw %}"):
        assert one(files({"a.yaml": PVH + f"cmdline: '{written}'\n"})).config.cmdline == "{{ x }}"
    plain = f"{PLAIN}\n{PVH}cmdline: '{{{{ x }}}}'\n"
    path = files({"a.yaml": plain, "etc/defaults.yaml": "vcpus: 7\n"})
    assert (one(path).config.cmdline, one(path).config.vcpus) == ("{{ x }}", 1)


def test_a_set_that_is_neither_key_nor_variable_is_refused(files: Files) -> None:
    path = files({"a.yaml": PVH + "cmdline: '{{ mode }}'\n"})
    assert one(path, "mode=quiet").config.cmdline == "quiet"
    (problem,) = problems(path, "mode=quiet", "mdoe=x")
    assert (problem.file, problem.message) == ("--set", "unknown key mdoe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "is a map"),
        ("env: 1\n", "env is the environment"),
        ("a: &x 1\n", "anchors"),
        ("a: [", "not valid"),
    ],
)
def test_wrong_files_of_variables(files: Files, text: str, message: str) -> None:
    path = files({"a.yaml": PVH + "extra: {{ a }}\n", "v.yaml": text})
    with pytest.raises(ConfigError, match=message) as caught:
        load_all(path, Inputs((), (str(path.parent / "v.yaml"),)))
    assert caught.value.file.endswith("v.yaml")


def test_a_plain_file_does_not_load_jinja2(files: Files) -> None:
    path = files({"a.yaml": PVH})
    code = (
        "import sys; from xtool.cli.app import main; main(sys.argv[1:]);"
        "print([m for m in ('jinja2', 'pycdlib', 'rich', 'xtool.hypercall') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["ok", "[]"]


_PIECES = st.sampled_from(
    ["{{ x }}", "{{ 'a\\nb' }}", "{% if x %}", "{% endif %}", "{% for i in [1, 2] %}", "{% endfor %}",
     "\n", "a: 1", "{# c\n #}", "{%- if x -%}", "- ", " ", "{{", "}}", "{% raw %}", "{% endraw %}",
     "{% set y = 1 %}", "{{ y }}", "{% macro m() %}", "{% endmacro %}", "{{ m() }}", "'", "\0", "\r\n",
     "\u2028", "{{ x.__init__ }}"]
)  # fmt: skip


@RELAXED
@given(st.lists(_PIECES | st.text(max_size=4), max_size=14).map("".join))
def test_no_template_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "soup.yaml"
    path.write_bytes((PVH + text).encode("utf-8", "surrogatepass"))
    try:
        load_all(path, Inputs(["x=1"]))
    except ConfigError as error:
        for problem in problems_of(error):
            assert problem.file == str(path) or problem.file == "--set"


@RELAXED
@given(
    st.lists(
        st.sampled_from(["a", "b: 1", "{{ 'v' }}", "{{ 'p\\nq' }}", "\n", "  ", "#", "é€"]), max_size=12
    ).map("".join)
)
def test_places_are_those_of_the_original(text: str) -> None:
    """Every literal character of what was rendered is at its place in the original."""
    from xtool.config.nodes import Source
    from xtool.config.template import render

    whole = f"{text}{{{{ '' }}}}"
    rendered = render(Source("x", whole), whole, {})
    source = Source("x", whole, places=rendered.places)
    originals = whole.split("\n")
    for number, line in enumerate(rendered.text.split("\n"), 1):
        for column, char in enumerate(line, 1):
            at, where = source.place(number, column)
            original = originals[at - 1]
            assert original[where - 1] == char or original[where - 1 :].startswith("{{")


# --- cloud_init -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        ("{user_data_file: /nope/x}", 30, "cannot read /nope/x: No such file", ""),
        ("{user_dta: x}", 14, "unknown sub-key user_dta", "user_data"),
        ("{user_data: hello}", 25, "cloud-init would ignore this", "#cloud-config"),
        ("{user_data: [a]}", 25, "text or a map is wanted, not a list", ""),
        ("{user_data_file: x, user_data: {}}", 30, "both given", "remove"),
        ('{meta_data: "a: ["}', 25, "a map is wanted, not other text", "local-hostname"),
        ("{meta_data: [a]}", 25, "a map is wanted, not a list", ""),
        ("{vdev: vda}", 20, "no virtual device", "xvdz"),
        ("{vdev: xvda}", 20, "used twice", "leave it out"),
        ("true", 13, "a map of keys is wanted", ""),
    ],
)
def test_wrong_seeds(files: Files, text: str, column: int, message: str, hint: str) -> None:
    path = files({"a.yaml": PVH + f"cloud_init: {text}\ndisk: ['/a,raw,xvda']\n"})
    (problem,) = problems(path)
    assert message in problem.message and (problem.line, problem.column) == (5, column)
    assert hint in (problem.hint or "")


def test_seed_files_are_read_beside_the_file_that_names_them(files: Files) -> None:
    path = files(
        {
            "web.yaml": "extends: t/base.yaml\nname: web\n",
            "t/base.yaml": "type: pvh\nmemory: 64\nkernel: k\ncloud_init: {user_data_file: init.sh}\n",
            "t/init.sh": "#!/bin/sh\necho {{ not rendered }}\n",
        }
    )
    config = one(path).config
    assert config.cloud_init is not None
    assert config.cloud_init.user_data == "#!/bin/sh\necho {{ not rendered }}\n"
    (path.parent / "t/init.sh").write_bytes(b"\x1f\x8b\xff")
    assert "is not UTF-8 text" in problems(path)[0].message
    (path.parent / "t/init.sh").write_bytes(b"#" * ((1 << 20) + 1))
    assert "too long" in problems(path)[0].message


# --- explain --------------------------------------------------------------------------------------------
def test_explain_says_where_values_come_from(files: Files) -> None:
    path = files(
        {
            "web.yaml": "extends: base.yaml\nname: web\nmemory: 128\nroot: /dev/xvda\n"
            "disk: ['/a,raw,xvda']\ncloud_init: {user_data: {password: hunter2}}\n",
            "base.yaml": "type: pvh\nmemory: 64\nkernel: k\ncloud_init: {vdev: xvdy}\n",
            "etc/defaults.yaml": "on_crash: preserve\nmemory: 32\n",
        }
    )
    loaded = one(path, "vcpus=2")
    folder = path.parent
    found = {each.key: each for each in explain(loaded)}
    assert found["memory"].origin == f"{path}:3" and found["memory"].value == 128
    assert found["memory"].replaced == (
        f"64 (template {folder}/base.yaml:2)",
        f"32 (host default {folder}/etc/defaults.yaml:2)",
    )
    assert found["kernel"].origin == f"template {folder}/base.yaml:3"
    assert found["on_crash"].origin == f"host default {folder}/etc/defaults.yaml:1"
    assert found["vcpus"].origin == "--set vcpus"
    assert found["cmdline"].origin == f"{path}:4" and found["cmdline"].value == "root=/dev/xvda"
    assert "maxmem" not in found
    everything = {each.key: each for each in explain(loaded, everything=True)}
    assert everything["maxmem"].origin == "built-in: what memory is" and everything["maxmem"].value == 128
    assert everything["tsc_mode"].origin == "built-in" and "vga" not in everything
    assert found["cloud_init"].value == {"user_data": HIDDEN, "vdev": "xvdy"}
    assert found["cloud_init"].origin == f"template {folder}/base.yaml:4, {path}:6"
    (inside,) = explain(loaded, "disk[0].vdev")
    assert (inside.value, inside.origin) == ("xvda", f"{path}:5")
    assert "hunter2" not in repr(explain(loaded, everything=True)) + repr(
        explain(loaded, "cloud_init.user_data")
    )
    for key, message in (("memroy", "no key memroy"), ("pci", "not supported"), ("disk[3]", "not given")):
        with pytest.raises(UsageError, match=message):
            explain(loaded, key)


def test_explain_says_what_a_set_took_the_place_of(files: Files) -> None:
    path = files(
        {
            "web.yaml": "extends: base.yaml\nname: web\nmemory: 128\n"
            "disk: ['/a,raw,xvda']\ncloud_init: {user_data: {password: hunter2}}\n",
            "base.yaml": "type: pvh\nmemory: 64\nkernel: k\n",
        }
    )
    inner = "cloud_init.user_data.password"
    loaded = one(path, "memory=256", "memory=512", "vcpus=2", "disk[0].vdev=xvdb", f"{inner}=other")

    def asked(key: str) -> tuple[object, str, tuple[str, ...]]:
        [found] = explain(loaded, key)
        return found.value, found.origin, found.replaced

    folder = path.parent
    assert asked("memory") == (
        512,
        "--set memory",
        ("256 (--set memory)", f"128 ({path}:3)", f"64 (template {folder}/base.yaml:2)"),
    )
    assert asked("vcpus") == (2, "--set vcpus", ())
    assert asked("disk[0].vdev") == ("xvdb", "--set disk[0].vdev", (f"xvda ({path}:4)",))
    assert asked("disk[0].target") == ("/a", f"{path}:4", ())
    assert asked(inner) == (HIDDEN, f"--set {inner}", (f"{HIDDEN} ({path}:5)",))


def test_the_verbs(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    path = files({"web.yaml": PVH + "---\n" + PVH.replace("web", "db")})
    assert main(["explain", str(path), "memory", "--only", "db"]) == 0
    out = capsys.readouterr().out
    assert f"from    : {path}:8" in out and "meaning : memory the guest starts with" in out
    assert main(["explain", str(path), "-o", "json"]) == 0
    assert [each["key"] for each in json.loads(capsys.readouterr().out)["db"]] == [
        "name",
        "type",
        "memory",
        "kernel",
    ]
    assert main(["check", str(path)]) == 0
    path.write_text(PVH + "vcpsu: 1\nmemory: 2\n")
    capsys.readouterr()
    path.write_text(PVH + "vcpsu: 1\ncap: x\n")
    assert main(["check", str(path), "-o", "json"]) == 3
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["problems"] == [
        {
            "file": str(path),
            "line": 5,
            "column": 1,
            "key": "vcpsu",
            "message": "unknown key vcpsu",
            "hint": "did you mean vcpus?",
            "source": "vcpsu: 1",
        },
        {
            "file": str(path),
            "line": 6,
            "column": 6,
            "key": "cap",
            "message": "cap: a number is wanted, not 'x'",
            "hint": None,
            "source": "cap: x",
        },
    ]


# --- the page -------------------------------------------------------------------------------------------
def test_the_yaml_of_the_page_is_right(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    found = [block for block in blocks(ROOT / "docs/config-files.md") if block.language == "yaml"]
    [shared] = [block.text for block in found if block.title == "web.yaml"]
    looped, seeded = (block.text for block in found if not block.title)
    path = files({"web.yaml": shared, "etc/templates/webserver.yaml": "type: pvh\nkernel: /k\n"})
    assert one(path).config.memory == 2048 * MIB
    loaded = load_all(files({"loop.yaml": looped}), Inputs(["count=2"]))
    assert [each.config.name for each in loaded] == ["web0", "web1"]
    assert loaded[0].config.kernel == "/root/vmlinuz"
    config = one(files({"seeded.yaml": PVH + seeded})).config
    assert config.cloud_init is not None and "nginx" in config.cloud_init.user_data


def test_pydantic_is_for_domain_files_only() -> None:
    code = (
        "import sys, xtool.toolstack.local, xtool.toolstack.destroy, xtool.toolstack.lifecycle;"
        "print([m for m in ('pydantic', 'yaml', 'jinja2', 'pycdlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
