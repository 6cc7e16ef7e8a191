"""What a run's models answer in words to questions that were held out, and what the answers are worth.

Likelihood says how well a model expects what a user wrote; LaMP asks for the answer itself. Every kept user's systems
answer the user's own test questions, greedily, and each task's answers are scored together, as LaMP does. Texts stay in
memory: what is returned and printed are numbers over users.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from common.config import load_config, read_config_file
from common.errors import DataError
from server import run_folder
from simulations import hosts
from simulations.personal import open_chat, open_store
from simulations.text_scores import TaskScores, score_task

__all__ = ["score_answers"]


def score_answers(run: Path, users: int, tokens: int) -> dict[str, list[TaskScores]]:
    """Let the systems of up to `users` kept users answer, in at most `tokens` tokens each.

    Returns:
        For each system the scores of every task that the users' test questions are of, in the order of the tasks.

    Raises:
        DataError: The run kept no adapters, or no kept user has a test question with a prompt.
    """
    host = hosts.host_of(load_config(read_config_file(run / run_folder.CONFIG)))
    with open_store(run) as store:
        kept = sorted(store.subjects(), key=int)[:users]
    golds: defaultdict[str, dict[str, str]] = defaultdict(dict)
    said: defaultdict[str, defaultdict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for user in kept:
        questions = [record for record in host.population.split(user).test if record.prompt]
        if not questions:
            continue
        session = open_chat(run, user)
        for number, record in enumerate(questions):
            name = f"{user}/{number}"
            golds[record.task][name] = record.response
            for system, answer in session.answer(record.prompt, tokens).items():
                said[system][record.task][name] = answer
    if not golds:
        raise DataError(f"{run}: no kept user has a test question with a prompt; plain text has no answers to score")
    return {
        system: [score_task(task, of_task[task], golds[task]) for task in sorted(golds)]
        for system, of_task in said.items()
    }
