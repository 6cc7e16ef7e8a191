"""pfl-research over a benchmark's workload, in an environment of its own: one round for every line on standard input.

Run by `homespun sim bench` with the Python of `make bench-rivals`. What it trains is what the others train: the same
base, the same records, the same steps, with the clip and noise of central privacy, in one process with one thread,
without evaluation. A user's records are one tensor, as pfl's data sets want them, padded to the user's longest record;
padding carries no label. After each round it prints processor and wall seconds.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Run rounds of `arguments[0]` users of workload `arguments[1]` until standard input ends."""
    warnings.filterwarnings("ignore")
    cohort, name = int(arguments[0]), arguments[1]
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from pfl.aggregate.simulate import SimulatedBackend  # pyright: ignore[reportMissingImports]
    from pfl.aggregate.weighting import WeightByUser  # pyright: ignore[reportMissingImports]
    from pfl.algorithm.base import NNAlgorithmParams  # pyright: ignore[reportMissingImports]
    from pfl.algorithm.federated_averaging import FederatedAveraging  # pyright: ignore[reportMissingImports]
    from pfl.callback.base import TrainingProcessCallback  # pyright: ignore[reportMissingImports]
    from pfl.data.federated_dataset import FederatedDataset  # pyright: ignore[reportMissingImports]
    from pfl.data.pytorch import PyTorchTensorDataset  # pyright: ignore[reportMissingImports]
    from pfl.data.sampling import get_user_sampler  # pyright: ignore[reportMissingImports]
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # pyright: ignore[reportMissingImports]
    from pfl.metrics import Metrics, Weighted  # pyright: ignore[reportMissingImports]
    from pfl.model.pytorch import PyTorchModel  # pyright: ignore[reportMissingImports]
    from pfl.privacy import (  # pyright: ignore[reportMissingImports]
        CentrallyAppliedPrivacyMechanism,
        GaussianMechanism,
    )

    from simulations.bench.workloads import RANK, SCALING, TARGETS, WORKLOADS, llama

    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - pfl draws from it
    workload = WORKLOADS[name]
    adapter = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=list(TARGETS), task_type="CAUSAL_LM")

    class Wrapped(torch.nn.Module):
        """Pfl wants `loss` and `metrics` on the module."""

        def __init__(self) -> None:
            super().__init__()
            self.lm: Any = get_peft_model(llama(), adapter).train()

        def loss(self, ids: Any, labels: Any) -> Any:
            return self.lm(input_ids=ids, labels=labels).loss

        def metrics(self, ids: Any, labels: Any) -> dict[str, Any]:
            return {"loss": Weighted(float(self.loss(ids, labels)) * len(ids), len(ids))}

    net = Wrapped()
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def tensors(own: list[Any]) -> dict[str, Any]:
        width = max(len(record.ids) for record in own)
        ids = torch.zeros(len(own), width, dtype=torch.long)
        labels = torch.full((len(own), width), -100)
        for row, record in enumerate(own):
            ids[row, : len(record.ids)] = torch.from_numpy(record.ids.astype(np.int64))
            labels[row, : len(record.ids)] = ids[row, : len(record.ids)]
        return {"ids": ids, "labels": labels}

    data = {number: tensors(own) for number, own in enumerate(workload.users(cohort))}

    class Turns(TrainingProcessCallback):  # pyright: ignore[reportUntypedBaseClass]
        """Waits for a line before every round, and says afterwards what the round took."""

        def on_train_begin(self, *, model: Any) -> Metrics:  # noqa: ARG002
            self._wait()
            return Metrics()

        def after_central_iteration(
            self,
            aggregate_metrics: Metrics,  # noqa: ARG002
            model: Any,  # noqa: ARG002
            *,
            central_iteration: int,  # noqa: ARG002
        ) -> tuple[bool, Metrics]:
            spent = {"cpu": time.process_time() - self._cpu, "wall": time.perf_counter() - self._wall}
            print(json.dumps(spent), flush=True)  # noqa: T201
            return not self._wait(), Metrics()

        def _wait(self) -> bool:
            goes_on = bool(sys.stdin.readline())
            self._cpu, self._wall = time.process_time(), time.perf_counter()
            return goes_on

    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(trainable, lr=1.0))
    users = FederatedDataset(
        lambda user: PyTorchTensorDataset(data[user], user_id=str(user)), get_user_sampler("minimize_reuse", list(data))
    )
    privacy = CentrallyAppliedPrivacyMechanism(GaussianMechanism(clipping_bound=1.0, relative_noise_stddev=0.5))
    algorithm = FederatedAveraging()
    algorithm._current_central_iteration = 1  # iteration 0 evaluates every user twice
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=10**6, evaluation_frequency=10**9, train_cohort_size=cohort, val_cohort_size=0
        ),
        SimulatedBackend(users, users, postprocessors=[WeightByUser(), privacy]),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.1, local_batch_size=workload.batch),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Turns()],
        send_metrics_to_platform=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
