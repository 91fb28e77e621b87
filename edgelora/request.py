"""What an export is asked for: base and adapters, read and checked, and the plan for them."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgelora.adapter import (
    PARTS,
    Adapter,
    PrefixFit,
    check_invocation,
    layer_ranges,
    read_adapter,
    refuse_input_factors,
    refuse_invocation,
    refuse_parts,
    refuse_prefix,
    refuse_replaced,
    valid_adapter_names,
    warning_about,
)
from edgelora.base_copies import compared
from edgelora.binding import check_biases, prefix_fit, with_prefix
from edgelora.calibration import CalibrationText, read_calibration
from edgelora.changed_base import changed_base
from edgelora.checkpoint import Checkpoint, open_checkpoint, read_tokenizer
from edgelora.choosing import choose, settle
from edgelora.device import load_profile
from edgelora.errors import EdgeLoraError
from edgelora.evaluation import EvaluationText, Subject
from edgelora.inventory import take_inventory
from edgelora.layout import targets
from edgelora.manifest import is_unicode
from edgelora.plan import CALIBRATION_WINDOWS, ExportOptions, Plan, make_plan
from edgelora.repeated_base import common_layers, repeated
from edgelora.reporting import measure_choices, read_report_text, subject_of, unreported
from edgelora.tokenizer import TokenizerFiles, from_folder

Progress = Callable[[str, int, int], None]
"""Stage ("measuring" for mode auto, "weights", "report"), steps done, steps in all."""


def silently(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Request:
    """A base and its adapters, read and checked against each other, not yet converted."""

    checkpoint: Checkpoint
    tokenizer: TokenizerFiles
    base_tokenizer: TokenizerFiles  # the same, unless the adapter has more tokens
    adapters: Mapping[str, Adapter]
    plan: Plan
    calibration: CalibrationText | None
    report_text: EvaluationText | None  # None: no report is wanted
    warnings: tuple[str, ...]


def prepare(
    base: Path,
    adapters: Mapping[str, Path],
    options: ExportOptions,
    progress: Progress = silently,
) -> Request:
    """Reads headers and adapters and decides the plan; writes nothing.

    Mode auto and merge base auto measure for it. Raises EdgeLoraError.
    """
    profile = load_profile(options.device) if options.device else None
    source = _repeated(open_checkpoint(base), adapters)
    read = _read_adapters(adapters, source, options)
    choice = settle(options, read)
    options = choice.options
    checkpoint = _checked(source, adapters, read, options)
    own_tokenizer = read_tokenizer(base)
    tokenizer = _tokenizer(own_tokenizer, source, checkpoint, adapters)
    _check_end_tokens(tokenizer, checkpoint)
    _check_all_texts(base, checkpoint, tokenizer, adapters, read)
    calibration = _read_calibration(checkpoint, tokenizer, options)
    decide = partial(
        make_plan,
        checkpoint.config,
        base=take_inventory(checkpoint, read),
        profile=profile,
        calibration=str(calibration) if calibration else None,
    )
    text, found = None, None
    if options.report or choice.is_open:
        text = read_report_text(options, checkpoint, tokenizer)
    if choice.is_open:
        assert text is not None
        draft = subject_of(checkpoint, decide(options), read)
        found = measure_choices(draft, text, partial(progress, "measuring"))
        choice = choose(choice, next(iter(read)), found)
    plan = decide(choice.options, measured=choice.reasons)
    _check_prefixes(adapters, read, prefix_fit(checkpoint.config, plan.context_length))
    read = {name: _bound(each, adapters[name], checkpoint) for name, each in read.items()}
    said = (warning_about(adapter, checkpoint.name) for adapter in read.values())
    warnings = tuple(warning for warning in said if warning)
    if not options.report:
        warnings += unreported(Subject(checkpoint, plan, read), found)
    shown = text if options.report else None
    texts = (calibration, shown)
    return Request(checkpoint, tokenizer, own_tokenizer, read, plan, *texts, warnings)


def _repeated(checkpoint: Checkpoint, folders: Mapping[str, Path]) -> Checkpoint:
    """The base with its layers as the adapters repeat them."""
    ranges = {path: layer_ranges(path) for path in folders.values()}
    return repeated(checkpoint, common_layers(ranges, checkpoint.config.num_hidden_layers))


def _read_adapters(
    folders: Mapping[str, Path], checkpoint: Checkpoint, options: ExportOptions
) -> dict[str, Adapter]:
    valid_adapter_names(folders)
    shapes = targets(checkpoint.config)
    read = {
        name: compared(read_adapter(path, shapes), path, checkpoint)
        for name, path in folders.items()
    }
    if options.mode == "merge" and len(read) != 1:
        raise EdgeLoraError(f"--mode merge: takes exactly one adapter, {len(read)} given")
    return read


def _checked(
    checkpoint: Checkpoint,
    folders: Mapping[str, Path],
    adapters: Mapping[str, Adapter],
    options: ExportOptions,
) -> Checkpoint:
    """The base, changed by what a merged adapter saved whole. Raises EdgeLoraError."""
    for name, adapter in adapters.items():
        _check_mode(adapter, folders[name], options, checkpoint.config.vocab_size)
        check_biases(adapter, folders[name], checkpoint.config)
        check_invocation(adapter, folders[name], checkpoint.config.vocab_size)
        if options.mode == "merge":
            checkpoint = changed_base(checkpoint, adapter, folders[name])
    return checkpoint


def _tokenizer(
    own: TokenizerFiles, source: Checkpoint, checkpoint: Checkpoint, folders: Mapping[str, Path]
) -> TokenizerFiles:
    """The base's, or of a grown vocabulary the adapter's. Raises EdgeLoraError."""
    if checkpoint.config.vocab_size == source.config.vocab_size:
        return own
    (folder,) = folders.values()
    return from_folder(folder)


def _check_prefixes(
    folders: Mapping[str, Path], adapters: Mapping[str, Adapter], fit: PrefixFit
) -> None:
    for name, adapter in adapters.items():
        if adapter.prefix is not None:
            fit.check(adapter.prefix, folders[name])


def _bound(adapter: Adapter, path: Path, checkpoint: Checkpoint) -> Adapter:
    try:
        return with_prefix(adapter, checkpoint)
    except EdgeLoraError as error:
        raise EdgeLoraError(f"{path}: {error}") from error


def _check_all_texts(
    base: Path,
    checkpoint: Checkpoint,
    tokenizer: TokenizerFiles,
    folders: Mapping[str, Path],
    adapters: Mapping[str, Adapter],
) -> None:
    settings = json.dumps(tokenizer.tokenizer_config, ensure_ascii=False)
    _check_texts(base, [checkpoint.name, settings])
    for name, path in folders.items():
        _check_texts(path, [adapters[name].base_model_name_or_path or ""])


def _check_mode(adapter: Adapter, path: Path, options: ExportOptions, vocab_size: int) -> None:
    """Raises EdgeLoraError for what a side branch of that flavor cannot do."""
    if options.mode == "merge":
        why = "merged it would act on the text before them too: use --mode side"
        refuse_invocation(adapter, path, why)
        refuse_prefix(adapter, path, "before the text no weight can hold them: use --mode side")
        return
    refuse_replaced(adapter, path, vocab_size)
    refuse_input_factors(adapter, path)
    if options.flavor == "ort":
        why = "flavor ort cannot do that in a side branch: use --mode merge or flavor edgelora"
        refuse_parts(adapter, path, PARTS, why)


def _read_calibration(
    checkpoint: Checkpoint, tokenizer: TokenizerFiles, options: ExportOptions
) -> CalibrationText | None:
    if options.calibration is None:
        return None
    return read_calibration(
        Path(options.calibration),
        tokenizer,
        checkpoint.config,
        windows=CALIBRATION_WINDOWS[options.quality],
    )


def _check_texts(source: Path, texts: Iterable[str]) -> None:
    """What goes into the manifest or a tokenizer file must be text that UTF-8 can say."""
    for text in texts:
        if not is_unicode(text):
            where, shown = (
                t.encode("utf-8", "backslashreplace").decode() for t in (str(source), text)
            )
            raise EdgeLoraError(f"{where}: {shown:.80} is not valid Unicode: rename it")


def _check_end_tokens(tokenizer: TokenizerFiles, checkpoint: Checkpoint) -> None:
    """The config's own ids have been checked where it was read."""
    rows = checkpoint.config.vocab_size
    beyond = [str(token) for token in tokenizer.eos_token_ids if token >= rows]
    if beyond:
        raise EdgeLoraError(
            f"{checkpoint.path}: end tokens {', '.join(beyond)} of the tokenizer: not below "
            f"vocab_size {rows}"
        )
