"""The table of commands and options, and the gate between what is typed and typed values."""

from __future__ import annotations

import ast
import inspect
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.cli import arranged, group, method
from apex_opt.cluster import list_presets
from apex_opt.described import COMMANDS, GROUPS
from apex_opt.engines import kind_names
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.gate import LONGEST_TEXT, REQUIRED, options_of
from apex_opt.ir import FORMATS, KV_BYTES
from apex_opt.plans.routing import ROUTINGS
from apex_opt.usage import wrapped

PLAN = COMMANDS["plan"]
NUMBERS = [option for option in PLAN.options if option.kind in (int, float)]
SWITCHES = [option.name for option in PLAN.options if option.kind is bool]
TEXTS = [option.name for option in PLAN.options if option.kind is str]


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_pass_their_own_checks(name: str) -> None:
    for option in COMMANDS[name].options:
        if option.default is not None and option.default is not REQUIRED:
            values = option.default if isinstance(option.default, tuple) else (option.default,)
            spelled = ",".join(map(str, values))
            assert option.read(spelled.lower() if option.kind is bool else spelled) == option.default


@pytest.mark.parametrize("name", ["pareto", "validate", "place", "cluster show"])
def test_every_picture_may_be_png_or_svg(name: str) -> None:
    (plot,) = (option for option in options_of(COMMANDS[name].shown) if option.name == "plot")
    assert (plot.read("a.png"), plot.read("a.svg")) == ("a.png", "a.svg")
    assert "PNG or SVG" in plot.text
    with pytest.raises(UsageError, match=r"ends in \.png or \.svg"):
        plot.read("a.pdf")


def test_help_says_what_prefix_caching_and_overlap_do_unless_told_otherwise() -> None:
    told = {option.name: option.text for option in PLAN.options}
    assert "by default false" in told["prefix_caching"]
    assert "Only plans that overlap in one of these ways are looked at" in told["overlap"]


def test_every_preset_is_named_in_the_help() -> None:
    assert f"Presets: {', '.join(list_presets())}." in COMMANDS["cluster show"].text


def test_a_file_to_write_may_end_in_either_of_two_ways() -> None:
    plot = COMMANDS["cluster show"].option("plot")
    assert [plot.read(name) for name in ("a.png", "a.svg")] == ["a.png", "a.svg"]
    for name in ("a.pdf", ".svg", "svg", " or "):
        with pytest.raises(UsageError, match=r"expected a file name that ends in \.png or \.svg"):
            plot.read(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_named_once(name: str) -> None:
    options = COMMANDS[name].options
    assert len({option.name for option in options}) == len(options)
    assert all(option.text.endswith((".", ')."')) for option in options)
    assert all(option.param.least < option.param.most for option in options if option.kind in (int, float))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_method_shows_its_options_as_signature_and_docstring(name: str) -> None:
    parameters = inspect.signature(method(name)).parameters
    assert list(parameters)[1:] == [option.name for option in COMMANDS[name].options]
    assert inspect.getdoc(method(name)).startswith(COMMANDS[name].summary)
    for option in COMMANDS[name].options:
        assert f"{option.name}: {option.text}" in method(name).__doc__


def test_a_method_returns_typed_options_with_defaults() -> None:
    request = method("plan")(None, max_num_seqs="64", debug="TRUE", gpu_memory_utilization=".5")
    assert request.command == "plan"
    assert request.arguments.max_num_seqs == 64
    assert request.shown.debug is True
    assert request.arguments.gpu_memory_utilization == 0.5
    assert request.arguments.gpus is None
    assert request.arguments.model == "llama-3.1-70b"


def test_a_method_takes_values_that_have_their_type() -> None:
    assert method("plan")(None, top=3, chunked_prefill=False, gpu_memory_utilization=1).arguments.top == 3


@pytest.mark.parametrize(
    "given",
    [{"top": 3.0}, {"top": True}, {"chunked_prefill": 0}, {"model": 7}, {"model": None}, {"slo": 5}, {"top": None}],
)
def test_a_method_refuses_values_of_another_type(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(given))}: expected"):
        method("plan")(None, **given)


def test_a_method_refuses_unknown_and_missing_options() -> None:
    with pytest.raises(UnknownNameError, match="did you mean model"):
        method("plan")(None, modle="x")
    with pytest.raises(UsageError, match="simulate: needs --plan"):
        method("simulate")(None)


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "nan", "NaN", "inf", "-inf", "Infinity", "1_000", "0x10", "1,,2", "[1]", "True", "None", "1 2", "٣"],
)
def test_numbers_are_refused_unless_spelled_as_such(option: object, text: str) -> None:
    with pytest.raises(UsageError, match=rf"--{option.name}: expected .*number between .* got "):
        option.read(text)


def test_several_values_are_a_tuple_each_checked_and_none_twice() -> None:
    option = PLAN.option("max_num_seqs")
    assert option.read("64, 256,1024") == (64, 256, 1024)
    assert option.read((64, 256)) == option.read([64, 256]) == (64, 256)
    assert option.read((64,)) == option.read([64]) == 64
    for value in ((), [], (64, 256.0), ([64],), (True,)):
        with pytest.raises(UsageError, match="--max_num_seqs: expected int, got "):
            option.read(value)
    assert option.read("64") == 64
    for text, fault in (("64,64", "twice"), ("64,0", "between 1 and"), ("64,x", "expected a whole number")):
        with pytest.raises(UsageError, match=f"--max_num_seqs: .*{fault}"):
            option.read(text)
    with pytest.raises(UsageError, match="--block_size: expected a whole number"):
        PLAN.option("block_size").read("8,16")


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
@pytest.mark.parametrize("text", ["-1", "99999999999999999999", "9" * 4000, "-" + "9" * 5000])
def test_numbers_out_of_range_name_the_range(option: object, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        option.read(text)
    message = str(caught.value)
    assert message.startswith(f"--{option.name}: ")
    assert "between" in message
    assert f"{option.param.most:.10g}" in message
    assert len(message) < 200


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_both_ends_of_a_range_are_inside(option: object) -> None:
    assert option.read(f"{option.param.least:.10g}") == option.param.least
    assert option.read(f"{option.param.most:.10g}") == option.param.most


@pytest.mark.parametrize("text", ["1e400", "-1e400", "1e99999"])
def test_a_number_beyond_floating_point_is_out_of_range(text: str) -> None:
    with pytest.raises(UsageError, match=rf": {text} is not between 0\.01 and 1"):
        PLAN.option("gpu_memory_utilization").read(text)


@pytest.mark.parametrize("text", ["1.0", "1e3", "16.5"])
def test_whole_numbers_have_no_fraction_or_exponent(text: str) -> None:
    with pytest.raises(UsageError, match="expected a whole number"):
        PLAN.option("block_size").read(text)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("text", ["yes", "no", "1", "0", "", "on", "None", "tru"])
def test_switches_take_true_and_false_only(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"--{name}: expected true or false, got {text!r}"):
        PLAN.option(name).read(text)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_texts_are_not_empty(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"--{name}: needs a value"):
        PLAN.option(name).read(text)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_not_longer_than_a_path(name: str) -> None:
    with pytest.raises(UsageError, match="4,097 characters"):
        PLAN.option(name).read("x" * (LONGEST_TEXT + 1))


def test_the_help_of_clocks_tells_the_default_that_the_command_has() -> None:
    for name, command in COMMANDS.items():
        if "clock" in (option.name for option in command.options):
            option = command.option("clock")
            assert ("by default the highest" in option.text.lower()) is (option.default is None), name


def test_choices_are_offered() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown --format 'jason'; did you mean json"):
        PLAN.option("format").read("jason")
    with pytest.raises(UnknownNameError, match=r"unknown --runnable 'vllm,sglang'; .*; one at a time"):
        PLAN.option("runnable").read("vllm,sglang")


@given(st.text())
def test_values_reach_the_parser_quoted_and_unchanged(text: str) -> None:
    command, word = arranged(["plan", f"--model={text}"])
    assert command == "plan"
    assert word.startswith("--model=")
    assert ast.literal_eval(word.removeprefix("--model=")) == text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--top", "3"], "--top='3'"),
        (["--top=3"], "--top='3'"),
        (["--max-num-seqs=3"], "--max_num_seqs='3'"),
        (["--seed", "-1"], "--seed='-1'"),
        (["--seed", "-.5"], "--seed='-.5'"),
        (["--debug"], "--debug='true'"),
        (["--debug", "false"], "--debug='false'"),
        (["-f", "json"], "--format='json'"),
        (["-f=json"], "--format='json'"),
        (["--slo=ttft_p95<=1s"], "--slo='ttft_p95<=1s'"),
        (["--model="], "--model=''"),
    ],
)
def test_options_are_brought_into_one_form(words: list[str], expected: str) -> None:
    assert arranged(["plan", *words]) == ["plan", expected]


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["-h"], ["help"], ["--help", "--help"], ["help", "--help"]], ids=" ".join
)
def test_help_is_shown_for_all_commands(words: list[str]) -> None:
    assert arranged(words) == ["--", "--help"]


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--help"],
        ["plan", "-h"],
        ["--help", "plan"],
        ["help", "plan"],
        ["plan", "--model", "--help"],
        ["plan", "--model=x", "--bogus", "-h"],
        ["plan", "--", "--help"],
        ["plan", "--top=3", "--help", "--top=3"],
    ],
    ids=" ".join,
)
def test_help_is_shown_wherever_it_is_asked_for(words: list[str]) -> None:
    assert arranged(words) == ["plan", "--", "--help"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plna"], "unknown command 'plna'; did you mean plan"),
        (["_run"], f"unknown command '_run'; known: {', '.join(sorted({n.split()[0] for n in COMMANDS}))}; see"),
        (["__class__"], "unknown command '__class__'"),
        (["Plan"], "unknown command 'Plan'; did you mean plan"),
        (["plna", "--help"], "unknown command 'plna'"),
        (["-1"], "unknown command '-1'"),
        (["--model=x", "plan"], "'--model=x' stands before the command; write solve.py plan --name=value"),
        (["--", "plan"], "'--' stands before the command"),
        (["plan", "--modle=x"], "unknown option of plan '--modle'; did you mean --model"),
        (["plan", "--plan=tp8"], "--plan: plan has no such option"),
        (["models", "--top=3"], "--top: models has no such option"),
        (["plan", "--_x"], "unknown option of plan '--_x'"),
        (["plan", "--no-debug"], "unknown option of plan '--no-debug'; did you mean --debug"),
        (["plan", "-x"], "unknown option of plan '-x'"),
        (["plan", "-m", "x"], "unknown option of plan '-m'; did you mean --model"),
        (["plan", "--="], "unknown option of plan '--'"),
        (["plan", "-"], "unknown option of plan '-'"),
        (["plan", "--"], "plan: '--' has no meaning here"),
        (["plan", "--", "--interactive"], "plan: '--' has no meaning here"),
        (["plan", "--top=3", "--", "--trace"], "plan: '--' has no meaning here"),
        (["plan", "tp8"], "plan: 'tp8' belongs to no option; options are given as --name=value"),
        (["plan", "5"], "plan: '5' belongs to no option"),
        (["plan", "-5"], "plan: '-5' belongs to no option"),
        (["plan", ""], "plan: '' belongs to no option"),
        (["plan", "plan"], "plan: 'plan' belongs to no option"),
        (["plan", "--top=3", "4"], "plan: '4' belongs to no option"),
        (["plan", "--top=3", "--top=3"], "--top: given twice; give it once"),
        (["plan", "--top=3", "-t", "3"], "unknown option of plan '-t'; did you mean --top"),
        (["plan", "--model"], "--model: needs a value, such as --model=TEXT"),
        (["plan", "--model", "--top=3"], "--model: needs a value"),
        (["plan", "--top"], "--top: needs a value, such as --top=8"),
        (["simulate"], "simulate: needs --plan; see solve.py simulate --help"),
        (["simulate", "--model=x"], "simulate: needs --plan"),
        (["profile", "shwo"], "unknown command of profile 'shwo'; did you mean show?; see solve.py profile --help"),
        (["profile", "plan"], "unknown command of profile 'plan'"),
        (["profile", "show --gpu=x"], "unknown command of profile 'show --gpu=x'"),
        (["show"], "unknown command 'show'"),
        (["profile show"], "unknown command 'profile show'; did you mean profile"),
        (["profile", "--gpu=x", "show"], "'--gpu=x' stands before the command; write solve.py profile show --name"),
        (["--gpu=x", "profile", "show"], "'--gpu=x' stands before the command; write solve.py profile --name=value"),
        (["profile", "show", "all"], "profile show: 'all' belongs to no option"),
        (["profile", "show", "--model=x"], "--model: profile show has no such option"),
        (["profile", "import", "--kind=apex"], "profile import: needs --source; see solve.py profile import --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_make_no_sense_are_named(words: list[str], message: str) -> None:
    with pytest.raises((UsageError, UnknownNameError)) as caught:
        arranged(words)
    assert message in str(caught.value)


@pytest.mark.parametrize("words", [["profile"], ["profile", "--help"], ["help", "profile"], ["profile", "-h"]])
def test_a_first_word_alone_shows_what_may_follow(words: list[str]) -> None:
    assert arranged(words) == ["profile", "--", "--help"]


@pytest.mark.parametrize(
    "words", [["profile", "show", "-h"], ["--help", "profile", "show"], ["help", "profile", "show"]]
)
def test_commands_of_two_words_have_help_of_their_own(words: list[str]) -> None:
    assert arranged(words) == ["profile", "show", "--", "--help"]


def test_commands_of_two_words_take_options_as_others_do() -> None:
    assert arranged(["profile", "show", "-g", "l40s", "--format=json"]) == [
        "profile",
        "show",
        "--gpu='l40s'",
        "--format='json'",
    ]
    shown = group("profile")
    request = shown.show(gpu="l40s")
    assert (request.command, request.arguments.gpu, request.shown.format) == ("profile show", "l40s", "table")
    with pytest.raises(UsageError, match="profile import: needs --kind"):
        getattr(shown, "import")()


def test_every_group_has_commands_and_every_second_word_a_group() -> None:
    assert {name.split()[0] for name in COMMANDS if " " in name} == set(GROUPS)
    assert not set(GROUPS) & set(COMMANDS)
    for name in GROUPS:
        members = {command.split()[1] for command in COMMANDS if command.startswith(f"{name} ")}
        assert {member for member in dir(group(name)) if not member.startswith("_")} == members
        assert inspect.getdoc(group(name)).startswith(GROUPS[name].summary)


def test_help_is_broken_at_its_own_indentation() -> None:
    text = "NAME\n\n        " + "word " * 40
    lines = wrapped(text).splitlines()
    assert lines[:2] == ["NAME", ""]
    assert all(line.startswith("        word") and len(line) <= 80 for line in lines[2:])
    assert " ".join(lines[2:]).split() == ["word"] * 40


EXAMPLES = [
    line
    for text in (*(command.text for command in COMMANDS.values()), *(each.text for each in GROUPS.values()))
    for line in text.splitlines()
    if line.startswith("  solve.py ")
]


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_of_the_help_stands_on_one_line_and_is_understood(line: str) -> None:
    assert line in wrapped(f"DESCRIPTION\n{line}\n" + "word " * 40).splitlines()
    assert arranged(shlex.split(line)[1:])


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_help_names_every_number_format_engine_and_routing_there_is(command: str) -> None:
    def words(name: str) -> set[str]:
        return set(re.findall(r"[\w.-]*\w", COMMANDS[command].option(name).text))

    assert set(FORMATS) <= words("weights")
    assert set(KV_BYTES) <= words("kv")
    assert set(kind_names()) <= words("engine")
    assert set(ROUTINGS) <= words("routing")


def test_an_option_that_may_come_again_is_a_tuple_where_it_does() -> None:
    words = arranged(["simulate", "--plan=tp8", "--plan", "dp2 tp4", "--plan=a,'b'"])
    assert words == ["simulate", """--plan=('tp8', 'dp2 tp4', "a,'b'")"""]
    assert arranged(["simulate", "--plan=tp8"]) == ["simulate", "--plan='tp8'"]
    assert method("simulate")(None, plan=("tp8", "dp2")).arguments.plan == ("tp8", "dp2")
    assert method("simulate")(None, plan=["tp8", "dp2"]).arguments.plan == ("tp8", "dp2")
    assert method("simulate")(None, plan=["tp8"]).arguments.plan == "tp8"
    with pytest.raises(UsageError, match="--plan: needs a value, got an empty text"):
        method("simulate")(None, plan=("tp8", " "))
    with pytest.raises(UsageError, match="--plan: expected str"):
        method("explain")(None, plan=("tp8", "dp2"))
    with pytest.raises(UsageError, match="--plan: given twice"):
        arranged(["explain", "--plan=tp8", "--plan=tp4"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["plan", "--timeline=a.json"],
            "--timeline: plan has no such option, simulate has; see solve.py plan --help",
        ),
        (
            ["energy", "--objective=cost"],
            "--objective: energy has no such option, plan, pareto, explain, simulate and others have; see",
        ),
        (
            ["profile", "show", "--model=x"],
            "--model: profile show has no such option, plan, energy, pareto, explain and others have; see",
        ),
        (
            ["place", "--max-num_seqs=4", "--time-limit=2", "--top", "3"],
            "--top: place has no such option, plan, energy, capacity have; see solve.py place --help",
        ),
    ],
)
def test_an_option_of_other_commands_is_refused_by_its_name_and_theirs(words: list[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        arranged(words)
    assert str(caught.value).startswith(line)
