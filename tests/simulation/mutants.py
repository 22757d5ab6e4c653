# ruff: noqa: E501 (a mutant is a line)
"""The protocol broken in many ways: the simulator must notice each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

from pipelines.runs import claim, commits, run, write

IN_ORDER = (run, claim, commits, write)  # each imports names of those before it


class Mutant(NamedTuple):
    """What is broken, where, the text, and what stands in its place."""

    name: str
    module: ModuleType
    text: str
    instead: str


# fmt: off
MUTANTS = [
    # Claiming.
    Mutant("plans replace each other", claim, "created = run.storage.create(file, ", "created = True\n        run.storage.write(file, "),
    Mutant("whoever comes second keeps the plan of its own", claim, "    return theirs\n", "    return plan\n"),
    Mutant("a listing is deleted although its plan may be in force", claim, "    except GladError:  # not after", "    except (GladError, StorageError):  # not after"),
    Mutant("the loser's listing stays in force", claim, "    if listing not in [one.name for one in plan.listings]:", "    if listing in [one.name for one in plan.listings]:"),
    Mutant("another command resumes a foreign run", claim, "        difference = _difference(found.plan.identity, identity)", "        difference = None"),
    Mutant("a claim does not see later generations", claim, "            generation, newest, step = generation + step, data, 2 * step\n", "            generation, newest, step = generation + step, data, 0\n"),
    Mutant("the fence does not look", claim, "    if run.storage.read_all([_plan_file(run, plan.generation + 1)])[0] is not None:", "    if False:"),
    Mutant("the fence looks at its own generation", claim, "    if run.storage.read_all([_plan_file(run, plan.generation + 1)])[0] is not None:", "    if run.storage.read_all([_plan_file(run, plan.generation)])[0] is None:"),
    Mutant("an overwritten run shares its commits with the new one", claim, "repaired.get(shard, self.base)", "repaired.get(shard, 1)"),
    Mutant("a repaired shard keeps the name of its damaged commit", claim, "repaired.get(shard, self.base)", "self.base"),
    Mutant("a repair deletes the plan that it replaces", claim, "    repairs = (*plan.repairs,", "    run.storage.delete_file(_plan_file(run, plan.generation))\n    repairs = (*plan.repairs,"),
    Mutant("a cleared generation gives its number back", claim, "    run.storage.write(_plan_file(run, generation), CLEARED)", "    run.storage.delete_file(_plan_file(run, generation))"),
    # Writing.
    Mutant("writers write straight into results/", write, 'return join(STAGING, f"{generation}-{uuid4().hex[:16]}")', 'return "."'),
    Mutant("a repeated call writes the same names", write, 'return f"part-{shard:08d}-{generation}-{uuid4().hex[:16]}.parquet"', 'return f"part-{shard:08d}-{generation}-{shard:016x}.parquet"'),
    # Committing.
    Mutant("commits replace each other", commits, "ours = run.storage.create(file, json.dumps(asdict(written)", "ours = True\n    run.storage.write(file, json.dumps(asdict(written)"),
    Mutant("whoever comes second publishes its own files", commits, "        written = theirs\n", ""),
    Mutant("a shard is committed before its last piece", commits, "== plan.rows_of(piece.shard) + piece.shard_pages:", "> 0:"),
    Mutant("files are published before they are committed", commits, "    written = _sum(parts)\n    file", "    written = _sum(parts)\n    _publish(run, written, {})\n    file"),
    Mutant("no fence after the commit", commits, "        written = theirs\n    check_in_force(run, plan)\n", "        written = theirs\n"),
    Mutant("published by writing, not by linking", commits, "            if run.storage.link(staged, run.path(file)):", "            data = run.storage.read_all([staged])[0]\n            if data is not None:\n                run.storage.write(run.path(file), data)"),
    Mutant("the staged file is deleted before it is linked", commits, "            staged = run.path(commit.staged, file)\n", "            staged = run.path(commit.staged, file)\n            data = run.storage.read_all([staged])[0]\n            run.storage.delete_file(staged)\n            data is None or run.storage.write(staged, data)\n"),
    Mutant("a missing file counts as published", commits, "            elif not run.storage.holds(run.path(file), size):\n                return False\n", ""),
    Mutant("a cut file counts as published", commits, "        elif present[file] != size:\n            return False\n", ""),
    # Resuming.
    Mutant("a resumed run does not publish", commits, "published = [shard for shard, commit in commits.items() if _publish(run, commit, present)]", "published = list(commits)"),
    Mutant("a damaged commit counts as none", commits, "        if len(published) == len(found) and", "        if len(published) == len(commits) and"),
    Mutant("a complete run is resumed by what a listing shows", commits, "found = dict.fromkeys(range(plan.shards)) | _read(run, plan, every=True)", "pass"),
    Mutant("results are swept when a run is resumed", commits, "        _clear_older(run, plan)\n        found", "        _clear_older(run, plan)\n        _sweep(run, plan, {})\n        found"),
    Mutant("staging is swept when a run is resumed", commits, "        _clear_older(run, plan)\n        found", "        _clear_older(run, plan)\n        run.storage.delete_folder(run.path(STAGING))\n        found"),
    # Completing.
    Mutant("nothing is swept", commits, "    _sweep(run, plan, kept)\n", ""),
    Mutant("later generations are swept too", commits, "int(part[1] or 0) <= plan.generation and file", "file"),
    Mutant("later generations' staging is swept too", commits, "        if attempt and int(attempt[1]) <= plan.generation:", "        if attempt:"),
    Mutant("the last record holds", commits, "    if not run.storage.create(committed, data):\n        data = run.storage.read_all([committed])[0] or b\"\"\n", "    run.storage.write(committed, data)\n"),
    Mutant("run.json is written, not linked", commits, "    run.storage.link(committed, run.path(COMPLETE))", "    run.storage.write(run.path(COMPLETE), data)"),
    Mutant("no fence before run.json", commits, "    check_in_force(run, plan)\n    run.storage.link(committed", "    run.storage.link(committed"),
    Mutant("run.json before the sweep", commits, "    _sweep(run, plan, kept)\n    files", "    files"),
    Mutant("a run.json of any generation is ours", commits, "    return generation_of(record) == plan.generation and", "    return record is not None and"),
    # Overwriting.
    Mutant("older runs are not cleared", commits, "        _clear_older(run, plan)\n        found", "        found"),
    Mutant("older records stay", commits, "    run.storage.delete_files(run.path(numbered(RECORD, older)) for older in range(1, plan.generation))\n", ""),
    Mutant("run.json is deleted whatever it says by then", commits, "run.storage.delete_file(run.path(COMPLETE), only=data)", "run.storage.delete_file(run.path(COMPLETE))"),
    Mutant("an older run.json stays", commits, "    if data is not None and generation_of(parse_record(data)) < plan.generation:", "    if False:"),
    Mutant("results go before run.json", commits, "    data = run.storage.read_all([run.path(COMPLETE)])[0]\n    if data is not None and generation_of", "    for generation, old in older_plans(run, plan):\n        _delete_run(run, generation, old)\n    data = run.storage.read_all([run.path(COMPLETE)])[0]\n    if data is not None and generation_of"),
    Mutant("generations of the same run are cleared", claim, "    generations = range(1, plan.base)", "    generations = range(1, plan.generation)"),
    Mutant("staged files of an older run stay", commits, "    run.storage.delete_files(run.path(commit.staged, file) for commit in found for file in commit.files)\n", ""),
    Mutant("published files go before staged ones", commits, "    run.storage.delete_files(run.path(commit.staged, file) for commit in found for file in commit.files)\n    run.storage.delete_files(run.path(file) for commit in found for file in commit.files)\n", "    run.storage.delete_files(run.path(file) for commit in found for file in commit.files)\n    run.storage.delete_files(run.path(commit.staged, file) for commit in found for file in commit.files)\n"),
    Mutant("marked as cleared before it is", commits, "        _delete_run(run, generation, old)\n        mark_cleared(run, generation)\n", "        mark_cleared(run, generation)\n        _delete_run(run, generation, old)\n"),
    # Growing.
    Mutant("a run that grows is a new run", claim, "base=base or generation))", "base=generation))"),
    Mutant("a further listing replaces the one before", claim, "added=(*self.added, listing)", "added=(listing,)"),
    Mutant("shards of a further listing begin within the one before", claim, "shard - (self._ends[number] - listing.shards)", "shard - self._ends[0] + listing.shards"),
]
# fmt: on


@contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """Run the modules of the protocol with the mutant's text in place of the original's."""
    sources = {module: inspect.getsource(module) for module in IN_ORDER}
    found = sources[mutant.module].count(mutant.text)
    if found != 1:
        raise ValueError(f"{mutant.name}: the text is there {found} times")
    sources[mutant.module] = sources[mutant.module].replace(mutant.text, mutant.instead)
    before = {module: dict(vars(module)) for module in IN_ORDER}
    try:
        for module, source in sources.items():
            exec(compile(source, str(module.__file__), "exec"), vars(module))
        yield
    finally:
        for module, names in before.items():
            vars(module).clear()
            vars(module).update(names)
