"""The explorer's numbers for Prometheus, with the names of the usual bitcoin exporters where those have one."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from traincert.bridge.explorer.watch import Watch


class _Numbers(Collector):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        watch = self.watch
        gauges = {
            "bitcoin_blocks": "Height of the node's tip.",
            "bitcoin_peers": "Connections of the node.",
            "bitcoin_size_on_disk": "Bytes of the node's blocks.",
            "bitcoin_difficulty": "Difficulty of the tip.",
            "bitcoin_latest_block_time": "Unix time of the tip, seconds.",
            "traincert_node_up": "Whether the node answers.",
        }
        families = {name: GaugeMetricFamily(name, text, labels=["node"]) for name, text in gauges.items()}
        errors = CounterMetricFamily("bitcoin_exporter_errors", "Calls of the node that failed.", labels=["node"])
        for node in watch.nodes:
            errors.add_metric([node.name], watch.errors[node.name])
            families["traincert_node_up"].add_metric([node.name], node.up)
            if not node.info:
                continue
            families["bitcoin_blocks"].add_metric([node.name], node.info["blocks"])
            families["bitcoin_peers"].add_metric([node.name], node.connections)
            families["bitcoin_size_on_disk"].add_metric([node.name], node.info["size_on_disk"])
            families["bitcoin_difficulty"].add_metric([node.name], node.info["difficulty"])
            if tip := watch.blocks.get(node.tip or ""):
                families["bitcoin_latest_block_time"].add_metric([node.name], tip.time)
        yield GaugeMetricFamily("up", "Whether a node answers.", any(node.up for node in watch.nodes))
        yield from families.values()
        yield errors
        yield from self._training()

    def _training(self) -> Iterable[Metric]:
        watch = self.watch
        yield CounterMetricFamily("traincert_reorganisations", "Of all nodes, seen.", watch.reorganisations)
        alarms = GaugeMetricFamily("traincert_alarms", "Alarms that go on.", labels=["kind"])
        kinds = ("down", "equivocation", "fork", "lagging", "no-block")
        open_alarms = [alarm.kind for alarm in watch.alarms if alarm.ended is None]
        for kind in kinds:
            alarms.add_metric([kind], open_alarms.count(kind))
        yield alarms
        tip = watch.blocks.get(watch.main.tip or "")
        if tip is None or tip.certificate is None:
            return
        certificate, cycle, loss = tip.certificate, watch.cycle(tip), watch.loss(tip)
        if loss is not None:
            yield GaugeMetricFamily("traincert_loss", "Validation loss after the tip, nats.", loss)
        yield GaugeMetricFamily("traincert_weight", "Weight of the tip's table.", certificate.contributions_weight)
        yield GaugeMetricFamily("traincert_contributions", "Leaves of it.", certificate.contributions_count)
        yield GaugeMetricFamily("traincert_round", "Round of the tip.", certificate.round)
        if cycle and cycle.metric is not None:
            yield GaugeMetricFamily("traincert_metric", "Metric on the validation examples.", cycle.metric)
        if cycle:
            yield GaugeMetricFamily("traincert_refusals", "Refused updates of the cycle.", sum(cycle.refusals.values()))


def metrics(watch: Watch) -> bytes:
    """Return the numbers in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Numbers(watch))
    return generate_latest(registry)
