"""What a plan is asked for: which network, on which fleets."""

from __future__ import annotations

from pathlib import Path

from jobs.comparisons import Asked
from jobs.device_tables import DeviceTable
from jobs.plan_document import Network
from jobs.plan_options import CPU, Fleet, PlanConfig, parse_fleet
from jobs.run_evidence import Run
from model.checkpoint import open_shape
from model.config import Preprocessor, ViTConfig, count_blocks
from model.errors import CheckpointError, UserError
from model.feature_shapes import feature_shape
from model.tensor_names import num_parameters
from model.work import V1_5, tile_flop
from pipeline.records import shown_shape
from pipeline.storage import redact

PUBLISHED = "InternViT-6B-448px-V1-5"
# The 6B's preparation (preprocessor_config.json of the published checkpoints).
PUBLISHED_PREPROCESSOR = Preprocessor(448, 448, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CPU_TFLOP = 0.1  # of a tile: a network of more takes seconds a tile on a CPU
USUAL_FLEET = "8xH100"
GPU_FILE = Path("/dev/nvidia0")


def find_network(
    config: PlanConfig, run: Run | None
) -> tuple[Network, ViTConfig, Preprocessor, list[str]]:
    """The checkpoint's shape, or the published 6B's where there is none to be had."""
    notes: list[str] = []
    name, basis = config.model, "checkpoint"
    shape, preprocessor = V1_5, PUBLISHED_PREPROCESSOR
    if name is None:
        name, basis = PUBLISHED, "published shape"
        notes.append(f"no --model: reckoned with the published shape of {PUBLISHED}")
    else:
        try:
            shape, preprocessor = open_shape(name, config.revision)
        except CheckpointError as error:
            if run is None and _is_local(name):
                raise
            basis = "published shape"
            notes.append(f"{error}: reckoned with the published shape of {PUBLISHED}")
            name = PUBLISHED
    if run is not None:
        found = run.dataset.features
        due = {name: feature_shape(name, shape, preprocessor.crop) for name in found}
        if found != due:
            name = next(name for name in found if found[name] != due[name])
            raise UserError(
                f"plan --from {redact(run.output)}: its {name} is {shown_shape(found[name])}, the "
                f"network's {shown_shape(due[name])}; give its checkpoint as --model"
            )
    blocks = count_blocks(shape, config.layer)
    network = Network(
        name=name,
        basis="checkpoint" if basis == "checkpoint" else "published shape",
        tflop_per_tile=tile_flop(shape, blocks) / 1e12,
        parameters=num_parameters(shape),
        blocks=blocks,
        tile_size=preprocessor.crop,
    )
    return network, shape, preprocessor, notes


def find_fleets(
    config: PlanConfig, network: Network, run: Run | None, devices: DeviceTable
) -> Asked:
    """What was asked for; else this machine where it can hold the network, else eight H100."""
    fleets = tuple(map(parse_fleet, config.fleet)) or (_usual_fleet(config, network, run),)
    for fleet in fleets:
        if not fleet.is_cpu:
            devices.find(fleet.device)
        elif config.tensor_parallel > 1:
            raise UserError("tensor_parallel: a plan for cpu knows one rank; leave it out")
    replicas = None if config.replicas is None else config.replicas[1]
    return Asked(fleets, config.tensor_parallel, replicas)


def _usual_fleet(config: PlanConfig, network: Network, run: Run | None) -> Fleet:
    small = network.basis == "checkpoint" and network.tflop_per_tile <= CPU_TFLOP
    kinds = {how.device for commit in run.commits for how in commit.computed} if run else set()
    if kinds == {"cpu"} or (run is None and small and not GPU_FILE.exists()):
        return Fleet(1, CPU)
    return parse_fleet(USUAL_FLEET)


def wants_cpu(asked: Asked) -> bool:
    return any(fleet.is_cpu for fleet in asked.fleets)


def cpu_replicas(config: PlanConfig) -> int:
    return 1 if config.replicas is None else config.replicas[1]


def _is_local(model: str) -> bool:
    return Path(model).expanduser().exists() or model.startswith((".", "/", "~"))
