"""python -m tests.model: the search with other bounds."""

import argparse
import time

from tests.model import agents, properties, rules
from tests.model.search import Search
from tests.model.steps import Model
from tests.model.world import Bounds, first_world


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    for name, value in Bounds()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--limit", type=int, default=20_000_000, help="give up after so many states")
    given = vars(parser.parse_args())
    limit = given.pop("limit")
    bounds = Bounds(**given)
    rules.silence()
    began = time.monotonic()
    with agents.threads_aside():
        found = Search(first_world(bounds), Model(bounds).steps, properties.wrong, limit).run(properties.GOALS)
    print(f"{bounds}\n{found} in {time.monotonic() - began:.0f} s")
    print(found.wrong or "nothing is wrong")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
