"""`pdistill push outputs/demo me/digits`: a denoiser with its model card, to the Hugging Face hub or a folder."""

import re
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from pdistill.commands.arguments import Parser, directory_of, without_imports
from pdistill.commands.contenders import run_of
from pdistill.commands.run_directory import config_of
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line
from pdistill.files import whole_directory, write_text
from pdistill.report import card
from pdistill.report.card import MARK, Model
from pdistill.report.runs import check, rows_of

FOLDERS = ("unet", "scheduler", "network")
FILES = (
    "denoiser.json",
    "model_index.json",
    "pipeline.py",
    "time_embedding.safetensors",
    "README.md",
    "comparison.png",
    "samples.png",
)
OF_THE_HUB = {".gitattributes", "README.md", "LICENSE"}  # what a new repository may hold
LOCAL = "or write the folder here with --local FOLDER"


def main(arguments: list[str]) -> None:
    """Writes or uploads the folder and says where it is. Raises UserError for what cannot be pushed."""
    parser = Parser("pdistill push", description="A denoiser with its model card, on the Hugging Face hub.")
    parser.add_argument("source", help="a run, outputs/<name>, whose last student is pushed, or a denoiser's directory")
    parser.add_argument("repo_id", help="<owner>/<name> on the hub")
    parser.add_argument("--stage", help="another stage of the run, e.g. steps-0004 or teacher")
    parser.add_argument("--license", help="the hub's identifier, e.g. apache-2.0; by default the card names none")
    parser.add_argument("--local", metavar="FOLDER", help="write the folder there, and upload nothing")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="a branch of the repository; made if it is not there")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the card alone")
    push(parser.parse_args(without_imports(arguments)))


def push(settings: Namespace) -> None:
    """What `main` does, of its parsed arguments."""
    _check(settings)
    model = find(settings.source, settings.stage)
    folder = None if settings.local is None else _free(directory_of(settings.local).resolve(), model)
    if not (folder or settings.dry_run or huggingface_hub.get_token()):
        raise UserError(f"the hub knows no token of yours here: run `hf auth login`, {LOCAL}")
    made = card.make(model, settings.repo_id, settings.license)
    _say_what_is_missing(settings, model, made)
    if settings.dry_run:
        print(made)
    elif folder is not None:
        with whole_directory(folder) as temporary:
            fill(temporary, model, made)
        print(f"wrote {folder}")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            fill(Path(temporary), model, made)
            print(f"pushed to {_upload(Path(temporary), settings)}")


def find(source: str, stage: str | None = None) -> Model:
    """The model that `source` names: a run's last student or its `stage`, or a denoiser's directory.

    Raises UserError where there is none, or its files are damaged.
    """
    path = directory_of(source)
    if not path.is_dir():
        raise UserError(f"{source} is no directory: give a run, e.g. outputs/demo, or a denoiser's directory in it")
    path = path / "denoiser" if (path / "denoiser" / "denoiser.json").exists() else path
    if not (path / "denoiser.json").exists():
        check(path)
        path = path / _stage(path, stage) / "denoiser"
    elif stage is not None:
        raise UserError(f"{source} is a denoiser, not a run of several stages: leave out --stage={stage}")
    run = run_of(path)
    config = {} if run is None else config_of(run)
    return Model(Denoiser.load(path), path, run, config)


def fill(folder: Path, model: Model, made: ModelCard) -> None:
    """Puts into an empty folder the denoiser's files, pictures and the card."""
    for file in model.directory.rglob("*"):
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise UserError(
                f"{file} is a link, or no file: what it leads to may be nobody's business. Push a copy of the "
                f"denoiser, made by cp -rL"
            )
    shutil.copytree(model.directory, folder, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    for name, picture in model.pictures.items():
        shutil.copyfile(picture, folder / name)
    write_text(folder / "README.md", str(made))


def _check(settings: Namespace) -> None:
    """What can be said of the arguments alone."""
    try:
        validate_repo_id(settings.repo_id)
    except HFValidationError as error:
        raise UserError(f"{settings.repo_id} cannot be a name on the hub: {first_line(error)}") from error
    if "/" not in settings.repo_id:
        raise UserError(f"{settings.repo_id} names no owner: give <owner>/<name>, e.g. me/{settings.repo_id}")
    license = settings.license
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(f"--license={license} is no identifier of the hub's: give one such as apache-2.0, mit or other")
    for name in ("private", "revision", "message"):
        if settings.local is not None and getattr(settings, name):
            raise UserError(f"--{name} is of an upload, and --local uploads nothing: leave one of them out")


def _stage(run: Path, asked: str | None) -> str:
    """The stage to push: the one asked for, or the last student that is finished."""
    finished = [row["stage"] for row in rows_of(run)]
    if asked is None and finished[-1:] == ["teacher"]:
        raise UserError(
            f"{run} has no finished student yet: run its command again, which goes on from where it was, or push its "
            f"teacher with --stage=teacher"
        )
    if asked is not None and asked not in finished:
        raise UserError(f"{run} has no finished stage {asked}: choose among {', '.join(finished)}")
    return asked or finished[-1]


def _free(folder: Path, model: Model) -> Path:
    """The folder, if it may be written or replaced. Raises UserError for one that holds what push did not write."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--local={folder} is a file: give a folder")
    source = model.directory.resolve()
    if folder == source or source in folder.parents or folder in source.parents:
        raise UserError(f"--local={folder} lies in or around {source}, which is to be copied: give another folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = names - {*FOLDERS, *FILES, *(path.name for path in source.iterdir())}
    readme = folder / "README.md"
    ours = readme.is_file() and MARK in readme.read_text(encoding="utf-8", errors="replace")
    if names and (foreign or not ours):
        what = f" ({sorted(foreign)[0]})" if foreign else ""
        raise UserError(f"--local={folder} holds files that push did not write{what}: give an empty or a new folder")
    return folder


def _say_what_is_missing(settings: Namespace, model: Model, made: ModelCard) -> None:
    """On stderr, so that --dry-run prints the card alone."""
    lines = []
    if settings.license is None:
        lines.append("no --license: the card names none, and nobody knows what the weights may be used for")
    if not made.data.get("eval_results"):
        lines.append(f"no metric of these weights is known: pdistill evaluate denoiser={model.directory} measures some")
    for key, given in (("base_model", "teacher"), ("datasets", "dataset.path")):
        if made.data.get(key):
            lines.append(f"the card says {key}: {made.data.get(key)}, after the run's {given}")
    print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr)


def _upload(folder: Path, settings: Namespace) -> str:
    """The address of the repository, which is made if it is not there. Raises UserError for whatever the hub says."""
    repo_id, revision = settings.repo_id, settings.revision
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo_id, private=settings.private or None, exist_ok=True)
        if settings.private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id} is there and public: make it private in its settings, or leave out --private")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        if there - OF_THE_HUB and "denoiser.json" not in there:
            raise UserError(f"{repo_id} holds files that push did not write: give another name, or delete them there")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=settings.message or "Push with pdistill",
            delete_patterns=[*FILES, *(f"{name}/*" for name in FOLDERS)],  # of an earlier push, unless written again
        )
    except UserError:
        raise
    except Exception as error:  # the hub's, its client's and the network's own, of many kinds
        raise UserError(_told(error, repo_id)) from error
    return str(address)


def _told(error: Exception, repo_id: str) -> str:
    """What to do about an error of the hub."""
    said = f"({type(error).__name__}: {first_line(error)})"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return f"the hub does not accept your token {said}: run `hf auth login`, {LOCAL}"
    if status in (403, 404):
        return (
            f"your token may not write to {repo_id} {said}: give a name of your own, `hf auth whoami` says whose, run "
            f"`hf auth login` with a token that may write, {LOCAL}"
        )
    if status is not None or isinstance(error, ValueError):
        return f"the hub does not take {repo_id} {said}"
    return f"the hub cannot be reached {said}: go online, {LOCAL}"
