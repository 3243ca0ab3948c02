"""Seeded bugs of the loop, the update, checkpoints and commands: each is noticed."""

import pytest

from tests.support.mutants import Laboratory, Mutant

pytestmark = pytest.mark.soak


def where(file: str, test: str, keyword: str = "") -> tuple[str, tuple[str, ...]]:
    chosen = ("-k", keyword) if keyword else ()
    return f"tinyclip/train/{file}.py", (f"tests/train/test_{test}.py", *chosen)


OPTIMIZER, UPDATE = where("optimizer", "update"), where("update", "update")
RESUMED = where("run", "run", "resum or generators or scaler or line or leftovers or fit")
FOLDERS, LOOP = where("checkpoint", "checkpoint"), where("loop", "fit")
RANKS = where("loop", "ranks", "as_one")


def mutant(name: str, place: tuple[str, tuple[str, ...]], old: str, new: str) -> Mutant:
    return Mutant(name, place[0], old, new, place[1])


MUTANTS = (
    mutant("warm-up from 0", OPTIMIZER, "lr * (step + 1) / warmup", "lr * step / warmup"),
    mutant("cosine over all steps", OPTIMIZER, "/ (steps - warmup)", "/ steps"),
    mutant("vectors decay", OPTIMIZER, "parameter.ndim >= 2 and", "True and"),
    mutant("frozen ones train", OPTIMIZER, " if p.requires_grad]", "]"),
    mutant("betas swapped", OPTIMIZER, "beta1, settings.beta2)", "beta2, settings.beta1)"),
    mutant("no unscaling", UPDATE, "        self.scaler.unscale_(optimizer)\n", ""),
    mutant("no scaler update", UPDATE, "        self.scaler.update()\n", ""),
    mutant("only the loss is judged", UPDATE, "self.norm.isfinite() & loss", "loss"),
    mutant(
        "nothing is left out", UPDATE, "optimizer.found_inf = None, bad", "found_inf = None, None"
    ),
    mutant("clips always", UPDATE, "if settings.grad_clip_norm is not None", "if True"),
    mutant("no clamp", UPDATE, "logit_scale.clamp_(0, MAX_LOG_SCALE)", "logit_scale"),
    mutant("the mean moves anyway", UPDATE, "self._average(1 - bad)", "self._average(bad * 0 + 1)"),
    mutant("the mean forgets", UPDATE, "(1 - self._settings.ema) *", "self._settings.ema *"),
    mutant("never in a row", UPDATE, "row = (row + 1) * bad", "row = bad"),
    mutant("always in a row", UPDATE, "row = (row + 1) * bad", "row = row + bad"),
    mutant(
        "ranks judge alone",
        where("update", "ranks", "as_one"),
        "dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self._group)",
        "pass",
    ),
    mutant(
        "no moments", where("update", "run", "resum"), "state.update(state)", "state.update({})"
    ),
    mutant(
        "no scaler state",
        where("update", "run", "scaler or resum"),
        'self.scaler.load_state_dict(plain["scaler"])',
        "pass",
    ),
    mutant(
        "no counts",
        where("update", "run", "counted"),
        'torch.tensor(plain["left_out"]',
        "torch.tensor([0, 0, 0]",
    ),
    mutant("no mean", where("update", "run", "resum"), "mean.copy_(ema[name])", "pass"),
    mutant("no random numbers", RESUMED, "rng.restore(training", "(training"),
    mutant(
        "everybody's numbers are rank 0's",
        where("run", "ranks", "as_one"),
        '["rng"][ranks.rank]',
        '["rng"][0]',
    ),
    mutant(
        "no weights", RESUMED, 'model.load_state_dict(_weights(folder / "model", model))', "pass"
    ),
    mutant("no cut of the rows", RESUMED, "cut_after(self.folder / name, state.step)", "pass"),
    mutant("any data will do", RESUMED, "if saved.get(name) == value or (", "if True or ("),
    mutant("later checkpoints are ignored", RESUMED, "        if later:", "        if False:"),
    mutant("later by name", RESUMED, "step > chosen]", "f'{step}' > f'{chosen}']"),
    mutant(
        "other data of one size",
        where("run", "commands", "other_data"),
        "self._samples = source.fingerprint()",
        "pass",
    ),
    mutant(
        "two in a folder",
        where("lock", "kills", "one_process"),
        "        return False\n",
        "        pass\n",
    ),
    mutant(
        "workers keep the lock",
        where("lock", "kills", "one_process"),
        "fcntl.lockf(",
        "fcntl.flock(",
    ),
    mutant(
        "finished stages may be others",
        where("changes", "commands", "edited"),
        "    if changed := list(",
        "    if changed := 0 * list(",
    ),
    mutant(
        "edits are not said",
        where("changes", "commands", "edited"),
        "if name not in told:",
        "if False:",
    ),
    mutant(
        "overridden flags are not said",
        where("changes", "commands", "overrides"),
        "        if stages:",
        "        if False:",
    ),
    mutant("leftovers stay", RESUMED, "        checkpoint.clean(self.checkpoints)\n", ""),
    mutant("no python", where("rng", "run", "generators"), "random.setstate((", "tuple(("),
    mutant("no numpy", where("rng", "run", "generators"), "np.random.set_state((", "tuple(("),
    mutant(
        "no torch",
        where("rng", "run", "generators"),
        'torch.set_rng_state(_tensor(states["torch"]))',
        "pass",
    ),
    mutant(
        "half of gauss",
        where("rng", "run", "generators"),
        "tuple(words), gauss",
        "tuple(words), None",
    ),
    mutant("not synced", FOLDERS, "            _sync(path)\n", "            pass\n"),
    mutant(
        "folders not synced",
        FOLDERS,
        '[*part.rglob("*"), part]',
        '[p for p in part.rglob("*") if p.is_file()]',
    ),
    mutant("the name is not synced", FOLDERS, "        _sync(folder.parent)\n", ""),
    mutant(
        "renamed too early",
        FOLDERS,
        "        write(part)\n",
        "        os.rename(part, folder); part = folder; write(part); return\n",
    ),
    mutant("the old one goes first", FOLDERS, "        remove(part)\n", "        remove(folder)\n"),
    mutant(
        "a failure leaves a part",
        FOLDERS,
        "        shutil.rmtree(part, ignore_errors=True)\n        if",
        "        if",
    ),
    mutant("the oldest is the latest", FOLDERS, "reversed(found.values())", "found.values()"),
    mutant("nothing is verified", FOLDERS, "            verify(path)\n", "            pass\n"),
    mutant(
        "added files are fine",
        FOLDERS,
        "sorted(names ^ found.keys())",
        "sorted(names - found.keys())",
    ),
    mutant("the newest are dropped", FOLDERS, "[:-keep]", "[keep:]"),
    mutant(
        "the place is the epoch's",
        where("loop", "run", "resum"),
        "divmod(step, len(loader))",
        "divmod(step - step % len(loader), len(loader))",
    ),
    mutant(
        "one step late",
        LOOP,
        "_batches(loader, state.step)) as",
        "_batches(loader, state.step + 1)) as",
    ),
    mutant("errors stay with their rank", RANKS, "    if any(failing):", "    if False:"),
    mutant("signals stay with their rank", RANKS, "any(asked)", "asked[0]"),
    mutant("own rows only", RANKS, "sum(rows), sum(skipped)", "len(batch.keys), sum(skipped)"),
    mutant("own broken samples only", RANKS, "sum(rows), sum(skipped)", "sum(rows), skipped[0]"),
    mutant("no group", RANKS, "pair, ranks.group)", "pair, None)"),
    mutant(
        "no DDP", RANKS, "    if ranks.group is None:\n        return forward", "    return forward"
    ),
    mutant("epochs may be short", LOOP, "if number != len(loader)", "if False"),
    mutant("never too many in a row", LOOP, "longest >= settings.max_skipped", "False"),
    mutant("one too many in a row", LOOP, "longest >= settings", "longest > settings"),
    mutant("broken samples never stop", LOOP, "accepted.count(Batch", "(Batch"),
    mutant(
        "small data are not judged",
        LOOP,
        "                    accepted.check()\n",
        "                    pass\n",
    ),
    mutant(
        "short runs are not judged",
        LOOP,
        "                _check_read(state",
        "                (state",
    ),
    mutant("nothing is a sample, too", LOOP, "    if not state.samples:", "    if False:"),
    mutant("the teacher reads the student's", LOOP, "move(batch.pairs[-1])", "student"),
    mutant("the scale is let go", LOOP, "scale.requires_grad_(False).fill_", "scale.data.fill_"),
    mutant("autocast is off", LOOP, "enabled=half is not None", "enabled=False"),
    mutant("pauses count", where("state", "fit", "counted"), "self._began += ", "0 * "),
    mutant(
        "no save when asked",
        where("loop", "kills", "signal"),
        "                run.save(state, clip, update, loader, ranks)\n                if stopped",
        "                if stopped",
    ),
    mutant(
        "signals are not caught",
        where("stop", "kills", "a_signal"),
        "signal.signal(number, self._handle)",
        "signal.getsignal(number)",
    ),
    mutant(
        "a second one waits, too",
        where("stop", "kills", "second"),
        "if number == signal.SIGINT:",
        "if False:",
    ),
    mutant(
        "handlers stay",
        where("stop", "kills", "a_signal"),
        "            signal.signal(number, handler)",
        "            pass",
    ),
    mutant(
        "the teacher's scale is its own",
        where("distill_command", "commands", "mimics"),
        "teacher_scale=stage.logit_scale",
        "teacher_scale=None",
    ),
    mutant(
        "stages begin with the teacher",
        where("distill_command", "commands", "middle or stages"),
        "            previous = student.model\n",
        "",
    ),
    mutant(
        "finished stages are made again",
        where("distill_command", "commands", "middle"),
        "previous = done.to(device)",
        "previous = None",
    ),
    mutant(
        "stages keep the command's steps",
        where("options", "commands", "stages"),
        "    wanted |= changes\n",
        "",
    ),
    mutant(
        "the schedule counts what another run did",
        where("update", "masks", "begun"),
        "step - first, settings.lr",
        "step, settings.lr",
    ),
    mutant(
        "nothing was done before",
        where("run", "masks", "begun"),
        "state = State(first)",
        "state = State()",
    ),
    mutant(
        "the pruned student begins at step 0",
        where("distill_command", "auto", "learned_masks"),
        "settings = replace(settings, first=self._stage.prune_at)",
        "pass",
    ),
    mutant(
        "masks that were begun are done",
        where("distill_command", "auto", "uninterrupted"),
        '(folder / "model").is_dir():',
        "folder.is_dir():",
    ),
    mutant(
        "the batch is the global one",
        where("options", "commands", "flags"),
        "args.train_num_samples / loader.global_batch",
        "args.train_num_samples",
    ),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_noticed(laboratory, mutant):
    assert not laboratory.survives(mutant)
