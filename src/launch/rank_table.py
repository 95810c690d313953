"""HCCL rank tables, by which clusters older than msrun start: written, read and checked.

python -m src.launch.rank_table write TABLE HOST=DEVICE_IP,DEVICE_IP,... [HOST=...]
python -m src.launch.rank_table check TABLE
"""

from __future__ import annotations

import ipaddress
import json
import socket
from dataclasses import dataclass
from pathlib import Path

from src.errors import UserError, executable


@dataclass(frozen=True)
class Device:
    """One line of a rank table."""

    device_id: int
    device_ip: str
    rank_id: int


def read_rank_table(path: str) -> dict[str, list[Device]]:
    """The devices of each server, in the table's order.

    Raises:
        UserError: no rank table, or one whose ranks, devices or addresses make no job.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        servers = {
            server["server_id"]: [
                Device(int(d["device_id"]), d["device_ip"], int(d["rank_id"]))
                for d in server["device"]
            ]
            for server in table["server_list"]
        }
        count, listed = int(table["server_count"]), len(table["server_list"])
    except OSError as error:
        raise UserError(f"RANK_TABLE_FILE {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"RANK_TABLE_FILE {path}: no rank table ({error!r})") from None
    devices = [device for server in servers.values() for device in server]
    faults = []
    if not devices or not all(servers.values()):
        faults.append("a server without devices")
    if not count == listed == len(servers):
        faults.append(f"server_count {count}, but {listed} entries of {len(servers)} servers")
    if sorted(d.rank_id for d in devices) != list(range(len(devices))):
        faults.append(f"rank_id must be 0 to {len(devices) - 1}, each once")
    for server, own in servers.items():
        if len({d.device_id for d in own}) < len(own):
            faults.append(f"server {server} lists a device_id twice")
        if not _is_address(server):
            faults.append(f"server_id {server!r} is no IP address")
    addresses = [d.device_ip for d in devices]
    if len(set(addresses)) < len(addresses):
        faults.append("a device_ip stands twice")
    faults += [f"device_ip {ip!r} is no IP address" for ip in addresses if not _is_address(ip)]
    if faults:
        raise UserError(f"RANK_TABLE_FILE {path}: {'; '.join(faults)}")
    return servers


def ranks_of_this_host(
    servers: dict[str, list[Device]], node_rank: str | None, path: str
) -> tuple[str, list[Device]]:
    """This host's server and its devices: by NODE_RANK where given, else by its addresses."""
    if node_rank is not None:
        if not node_rank.isdigit() or int(node_rank) >= len(servers):
            raise UserError(f"NODE_RANK={node_rank}: {path} has {len(servers)} servers, from 0")
        server = list(servers)[int(node_rank)]
        return server, servers[server]
    own = _own_addresses()
    server = next((address for address in servers if address in own), None)
    if server is None and len(servers) == 1:
        server = next(iter(servers))
    if server is None:
        raise UserError(
            f"RANK_TABLE_FILE {path}: none of its servers ({', '.join(servers)}) has an address of "
            "this host; give NODE_RANK"
        )
    return server, servers[server]


def write_rank_table(path: str, hosts: dict[str, list[str]]) -> None:
    """Write a table of hosts and the addresses of their devices, ranks in that order."""
    rank = 0
    servers = []
    for host, addresses in hosts.items():
        devices = []
        for number, address in enumerate(addresses):
            devices.append({"device_id": str(number), "device_ip": address, "rank_id": str(rank)})
            rank += 1
        servers.append({"server_id": host, "device": devices, "host_nic_ip": "reserve"})
    table = {
        "version": "1.0",
        "server_count": str(len(servers)),
        "server_list": servers,
        "status": "completed",
    }
    Path(path).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _is_address(text: object) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return isinstance(text, str)


def _own_addresses() -> set[str]:
    try:
        names = socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        names = []
    return {*names, "127.0.0.1"}


@executable
def main(argv: list[str]) -> None:
    """Write or check a rank table."""
    usage = "usage:" + __doc__.partition("\n\n")[2].rstrip()
    if len(argv) >= 3 and argv[0] == "write":
        hosts = {}
        for word in argv[2:]:
            host, _, devices = word.partition("=")
            hosts[host] = [device for device in devices.split(",") if device]
        if Path(argv[1]).exists():
            raise UserError(f"{argv[1]}: exists; remove it, or name another file")
        try:
            write_rank_table(argv[1], hosts)
            read_rank_table(argv[1])
        except UserError:
            Path(argv[1]).unlink()
            raise
        except OSError as error:
            raise UserError(f"{argv[1]}: {error.strerror}") from None
    elif len(argv) != 2 or argv[0] != "check":
        raise UserError(usage)
    for server, devices in read_rank_table(argv[1]).items():
        print(f"{server}: ranks {', '.join(str(device.rank_id) for device in devices)}")


if __name__ == "__main__":
    main()
