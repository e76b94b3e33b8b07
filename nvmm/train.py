"""Train a model: `nvmm train experiment=NAME [key=value ...]`, alone or under torchrun.

It composes and checks the config before torch is imported, agrees on it and on one run directory
with every other rank, then builds the components and hands them to the trainer.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nvmm.checkpoint.record import read_record
from nvmm.config import changes as resuming
from nvmm.config import check as configs
from nvmm.config import compose, machine
from nvmm.config.problem import Problem, View
from nvmm.io.files import disk_error, hold, write
from nvmm.parallel import environment
from nvmm.version import project_revision, revision

_NO_PATHS = ("auto", "never")
"""Values of `resume` that name no checkpoint."""
_SPLITS = ("train", "validation")
log = logging.getLogger("nvmm")
_PATIENCE = 120.0
"""Seconds to wait for a run directory that another machine holds: a requeue may come that early."""


def main() -> None:
    """Compose, check, train. Exits with compose.BAD_CONFIG when the config is refused."""
    job = compose.load("train")
    if job is None:
        return
    problems = missing_paths(job.config) or unfit(job.config)
    if problems:
        compose.refuse("train", problems)
    with compose.failures("train"):
        from torch.distributed.elastic.multiprocessing.errors import record

        # `record` leaves a failing rank's traceback for torchrun, so that it names the first one.
        record(train)(job)


def train(job: compose.Job) -> dict[str, Any]:
    """Run one job on this rank; return the trainer's summary."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    from nvmm.parallel import setup
    from nvmm.report.page import write_report
    from nvmm.training.run_log import RunLog
    from nvmm.training.summary import machine as this_machine
    from nvmm.training.summary import update_summary

    compose.log_to_stderr()
    run_log = RunLog().install()
    config = job.config
    try:
        # 1. Join the other ranks. From here on a refusal is all ranks' together.
        kernels = instantiate(config["kernels"], _convert_="all")
        precision = instantiate(config["precision"], _convert_="all")
        parallel = instantiate(config["parallel"], _convert_="all")
        kernels.install(setup.device_type(), log=environment.rank() == 0)
        parallel.initialize(seed=config["seed"])
        _agree(config)
        run_dir = _agree_on_directory(config)
        config["run"] |= {"id": run_dir.name, "dir": str(run_dir)}
        # What a resume refuses is refused before anything is built. mcore is imported here, after
        # `initialize` has silenced its warnings.
        from nvmm.training.start import checkpoint_to_resume, require_unchanged

        checkpoint_path = checkpoint_to_resume(run_dir, config["resume"])
        if checkpoint_path is not None:
            require_unchanged(checkpoint_path, config)
        # 2. Build the components that the config names, then the trainer of them all.
        components = {
            name: instantiate(config[name], _convert_="all")
            for name in ("model", "lora", "objective", "optim", "tokenizer")
        }
        _check_vocabulary(config["model"], components["tokenizer"])
        data = instantiate(config["data"], _convert_="all")(
            tokenizer=components.pop("tokenizer"), seed=config["seed"]
        )
        checkpoint = instantiate(config["checkpoint"], _convert_="all")(
            directory=run_dir / "checkpoints"
        )
        logger = instantiate(config["logger"], _convert_="all")(
            run_dir=run_dir,
            config=config,
            run_name=f"{config['run']['name']}/{config['run']['id']}",
            enabled=environment.rank() == 0,
        )
        trainer = instantiate(config["trainer"], _convert_="all")(
            **components,
            data=data,
            checkpoint=checkpoint,
            logger=logger,
            parallel=parallel,
            precision=precision,
            run_dir=run_dir,
            config=config,
            overrides=job.overrides,
            **{name: config[name] for name in ("backend", "seed", "resume", "init_from")},
        )
    except InstantiationException as error:
        # A constructor's ValueError names its key and what is allowed; Hydra's frames say nothing.
        if not isinstance(error.__cause__, ValueError):
            raise
        compose.refuse("train", [error.__cause__])
    except ValueError as error:
        compose.refuse("train", [error])
    except Exception:
        run_log.tell()
        raise

    def started() -> None:
        run_log.open(run_dir, environment.rank())
        _write(run_dir, job)

    # 3. Train; a collective that hangs is named as what it is.
    try:
        summary: dict[str, Any] = trainer.fit(started=started)
    except RuntimeError as error:
        stalled = setup.stalled_collective(error)
        if stalled is None:
            raise
        raise TimeoutError(
            f"rank {environment.rank()}: a collective did not complete within"
            f" parallel.timeout_minutes={parallel.timeout_minutes}, or another rank died: {stalled}"
        ) from error
    logger.close()
    if environment.rank() == 0 and (
        # A start without a step leaves what is known of the run, unless it was killed before that.
        summary["steps"] > summary["first_step"] or _recorded_steps(run_dir) != summary["steps"]
    ):
        revisions = {"git_revision": revision(), "project_revision": project_revision(Path.cwd())}
        update_summary(run_dir, **summary, **revisions, machine=this_machine())
        try:
            log.info("report: %s", write_report(run_dir))
        except OSError as error:
            raise disk_error(run_dir / "report.html", error) from error
    setup.shutdown()
    return summary


def _recorded_steps(run_dir: Path) -> int | None:
    path = run_dir / "summary.json"
    return json.loads(path.read_text()).get("steps") if path.exists() else None


def _check_vocabulary(model: dict[str, Any], tokenizer: Any) -> None:
    """Raise ValueError for a model without an embedding for every token."""
    key = "model.language" if "language" in model else "model"
    size = model.get("language", model)["vocab_size"]
    # A placeholder behind the vocabulary needs no row: features take its place.
    needed = tokenizer.vocab_size - (tokenizer.image_id == tokenizer.vocab_size - 1)
    if size < needed:
        raise ValueError(
            f"{key}.vocab_size={size} must be at least the {needed} tokens of"
            f" tokenizer.path={tokenizer.path}"
        )


def _agree(config: dict[str, Any]) -> None:
    """End the process when the config is not the same on every rank, naming ranks and keys."""
    import torch
    import torch.distributed as dist

    first = json.loads(_from_first_rank(json.dumps(config)))
    differs = configs.digest(config) != configs.digest(first)
    flags = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(flags, torch.tensor([int(differs)]))
    ranks = [rank for rank, flag in enumerate(flags) if flag.item()]
    if differs:
        changes = resuming.changes(first, config)
        compose.refuse(
            "train", [f"{c.key}={c.current!r} is {c.saved!r} on rank 0" for c in changes]
        )
    if ranks:
        compose.refuse(
            "train", [f"ranks {ranks} composed another config than rank {dist.get_rank()}"]
        )


def _agree_on_directory(config: dict[str, Any]) -> Path:
    """Return the run directory, chosen by rank 0 and the same on every rank."""
    chosen = ""
    if environment.rank() == 0:
        owner = {"config": configs.digest(config), "sweep_job": environment.sweep_job()}
        chosen = str(run_directory(config["run"], owner=owner))
        holder = hold(Path(chosen) / ".lock", wait=_PATIENCE)
        if holder is not None:
            problem = Problem("run.dir", chosen, f"is being trained by {holder}: name another")
            chosen = f"\0{problem}"
        elif config["resume"] == "never" and any(Path(chosen).glob("checkpoints/step_*")):
            problem = Problem("resume", "never", f"must be auto where {chosen} has a checkpoint")
            chosen = f"\0{problem}"  # No path has a zero byte, so the other ranks can tell.
    chosen = _from_first_rank(chosen)
    if chosen.startswith("\0"):
        compose.refuse("train", [chosen[1:]])
    return Path(chosen)


def run_directory(
    run: dict[str, Any], root: Path = Path("runs"), owner: dict[str, Any] | None = None
) -> Path:
    """Make the folder of a run, `run.dir`, else runs/<name>/<id>, and return it.

    The id is `run.id`, the launcher's job id where that survives a requeue, else the start time.
    A job of a sweep adds its number. A restart by torchrun (--max-restarts) finds the directory of
    the first start again.

    owner: the run's config digest and number in its sweep. A job of the launcher's may start
    several commands: the first has the job's id, the others add their digest to it.
    """
    job = environment.sweep_job()
    mark = "" if job is None else f"-{job}"
    if run["dir"] is not None:
        path = Path(f"{run['dir']}{mark}")
    elif run["id"] is not None:
        path = root / str(run["name"]) / f"{run['id']}{mark}"
    elif (job_id := environment.requeued_id()) is not None:
        path = root / str(run["name"]) / f"{job_id}{mark}"
        path.mkdir(parents=True, exist_ok=True)
        if owner is not None and not _claim(path / "owner.json", owner):
            path = path.with_name(f"{path.name}-{configs.digest(owner)[:8]}")
    else:
        return _timed_directory(root / str(run["name"]))
    path.mkdir(parents=True, exist_ok=True)
    return path


def _claim(mark: Path, owner: dict[str, Any]) -> bool:
    """Return whether a directory, whose owner `mark` names, is this owner's; a free one becomes it.

    Linking a written file is atomic, also where several processes do it at once.
    """
    temporary = mark.with_name(f".{mark.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.write_text(json.dumps(owner))
        os.link(temporary, mark)
    except FileExistsError:
        return bool(json.loads(mark.read_text()) == owner)
    except OSError as error:
        raise disk_error(mark, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def missing_paths(config: dict[str, Any]) -> list[Problem]:
    """Return a problem for each folder or file that a config names and this machine has not."""
    keys = ["tokenizer.path"]
    if not _goes_on(config):
        keys.append("init_from")
    if config.get("resume") not in _NO_PATHS:
        keys.append("resume")
    problems = [*machine.missing_folders(config, keys)]
    blend = View(config).get("data.blend")
    shards = {f"data.{s}.shards": View(config).get(f"data.{s}.shards") for s in _SPLITS}
    for index, entry in enumerate(blend if isinstance(blend, list) else []):
        shards[f"data.blend[{index}].shards"] = entry.get("shards")
    for key, patterns in shards.items():
        problems += machine.unmatched(key, patterns)
    return problems


def unfit(config: dict[str, Any]) -> list[Problem]:
    """Return the problems of a config with the weights that it starts from, and with the disk."""
    problems: list[Problem] = []
    source = config.get("init_from")
    if isinstance(source, str) and not _goes_on(config):
        try:
            saved = _saved_model(Path(source).expanduser())
        except ValueError as error:
            return [Problem("init_from", source, f"cannot be read: {error}")]
        problems += machine.misfits(saved, config["model"], source)
    return [*problems, *machine.disk(config, _expected_directory(config).absolute())]


def _goes_on(config: dict[str, Any]) -> bool:
    """Return whether a run has a checkpoint, which it goes on from whatever became of `init_from`.

    A LoRA run needs its base still, and says so by the weights that it looks for.
    """
    if "run" not in config or config["resume"] == "never":
        return False
    if config["resume"] not in _NO_PATHS:
        return True
    return any(_expected_directory(config).glob("checkpoints/step_*/state.json"))


def _expected_directory(config: dict[str, Any], root: Path = Path("runs")) -> Path:
    """Return the folder that `run_directory` will find, or make; nothing is made here.

    A requeued job finds its checkpoints there, which need no room any more.
    """
    run, job = config["run"], environment.sweep_job()
    parent, mark = root / str(run["name"]), "" if job is None else f"-{job}"
    if run["dir"] is not None:
        return Path(f"{run['dir']}{mark}")
    if run["id"] is not None:
        return parent / f"{run['id']}{mark}"
    if (job_id := environment.requeued_id()) is not None:
        path = parent / f"{job_id}{mark}"
        owner = {"config": configs.digest(config), "sweep_job": job}
        other = path.with_name(f"{path.name}-{configs.digest(owner)[:8]}")
        return other if other.exists() else path
    launch = environment.generated_id()
    earlier = sorted(parent.glob(f"*-{launch[:8]}")) if launch else []
    return earlier[0] if earlier else parent


def _saved_model(source: Path) -> dict[str, Any]:
    """Return the config of the model that a checkpoint or a run saved, {} where it saved none.

    Damaged checkpoints of a run are left aside, as loading does. Raises ValueError where all are.
    """
    states = machine.states(source)
    for number, folder in enumerate(states, 1):
        try:
            return (read_record(folder)["state"].get("config") or {}).get("model") or {}
        except ValueError:
            if number == len(states):
                raise
    return {}


def _timed_directory(parent: Path) -> Path:
    """Make a folder named by the start time, or find that of this launch's first start."""
    launch = environment.generated_id()
    mark = f"-{launch[:8]}" if launch else ""
    earlier = sorted(parent.glob(f"*{mark}")) if mark else []
    if earlier:
        return earlier[0]
    started = time.strftime("%Y%m%d-%H%M%S") + mark
    path = parent / started
    attempt = 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # Another run started in the same second.
            attempt += 1
            path = parent / f"{started}-{attempt}"


def _from_first_rank(text: str) -> str:
    """Return rank 0's `text` on every rank."""
    import torch
    import torch.distributed as dist

    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    length = torch.tensor([data.numel()])
    dist.broadcast(length, src=0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length.item()), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return data.numpy().tobytes().decode()


def _write(run_dir: Path, job: compose.Job) -> None:
    """Keep the config that the run started with; a refused resume leaves the earlier start's."""
    if environment.rank() != 0:
        return
    texts = {
        name: OmegaConf.to_yaml(OmegaConf.create(content))
        for name, content in (("config", job.config), ("overrides", job.overrides))
    }
    paths = {name: run_dir / f"{name}.yaml" for name in texts}
    known = {name: path.read_text() for name, path in paths.items() if path.exists()}
    if known and known != texts:
        # What earlier steps were trained with stays: config.0001.yaml is the first start's.
        number = 1 + len(list(run_dir.glob("config.[0-9]*.yaml")))
        for name in known:
            paths[name].rename(run_dir / f"{name}.{number:04d}.yaml")
    for name, text in texts.items():
        write(paths[name], text)
    # The run may be moved to where its tokenizer is not.
    folder = (job.config.get("tokenizer") or {}).get("path")
    if folder is not None and not (run_dir / "tokenizer").is_dir():
        from nvmm.convert.formats.all import copy_tokenizer

        temporary = run_dir / ".tokenizer"
        shutil.rmtree(temporary, ignore_errors=True)
        source = Path(folder).expanduser()
        if copy_tokenizer(source, temporary):
            # A model's type says how text is split where tokenizer_config.json does not.
            if (source / "config.json").is_file():
                shutil.copyfile(source / "config.json", temporary / "config.json")
            temporary.rename(run_dir / "tokenizer")


if __name__ == "__main__":
    main()
