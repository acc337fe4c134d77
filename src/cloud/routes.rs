//! Which interface of this machine leads to an address.
//!
//! By the routes of the main table (proc(5): `/proc/net/route`, `/proc/net/ipv6_route`), below the root of
//! [`super::hardware`]. An address of this machine is reached by the interface that leads to its neighbours.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

fn text(path: PathBuf) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The interface whose route leads to `toward`; `None`: none does, or the table can't be read.
pub fn interface(root: &Path, toward: IpAddr) -> Option<String> {
    match toward {
        _ if toward.is_loopback() => Some("lo".to_owned()),
        IpAddr::V4(toward) => route_v4(&text(root.join("proc/net/route")), toward),
        IpAddr::V6(toward) => route_v6(&text(root.join("proc/net/ipv6_route")), toward),
    }
}

const UP: u32 = 0x1;
const REJECT: u32 = 0x200;

fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 16).ok()
}

/// The longest prefix, and of several the lowest metric.
fn best(routes: impl Iterator<Item = (u32, u32, String)>) -> Option<String> {
    routes.max_by_key(|(prefix, metric, _)| (*prefix, std::cmp::Reverse(*metric))).map(|(.., interface)| interface)
}

/// By a table of `Iface Destination Gateway Flags RefCnt Use Metric Mask …`, addresses as they lie in memory.
fn route_v4(table: &str, toward: Ipv4Addr) -> Option<String> {
    best(table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [interface, destination, _, flags, _, _, metric, mask, ..] = fields[..] else { return None };
        let (destination, mask) = (u32::from_be(hex(destination)?), u32::from_be(hex(mask)?));
        let leads = hex(flags)? & (UP | REJECT) == UP && u32::from(toward) & mask == destination;
        leads.then(|| Some((mask.count_ones(), metric.parse().ok()?, interface.to_owned())))?
    }))
}

/// By a table of `destination length source length gateway metric … flags interface`.
fn route_v6(table: &str, toward: Ipv6Addr) -> Option<String> {
    best(table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [destination, length, _, _, _, metric, _, _, flags, interface] = fields[..] else { return None };
        let (destination, length) = (u128::from_str_radix(destination, 16).ok()?, hex(length)?.min(128));
        let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
        let leads = hex(flags)? & (UP | REJECT) == UP && u128::from(toward) & mask == destination & mask;
        leads.then(|| Some((length, hex(metric)?, interface.to_owned())))?
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10.0.0.0/20 and 172.17.0.0/16 on links, the rest by two gateways; one link is down, one route rejects.
    const V4: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
ens5\t00000000\t0100000A\t0003\t0\t0\t512\t00000000\t0\t0\t0
ens6\t00000000\t0101000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
ens5\t0000000A\t00000000\t0001\t0\t0\t512\t00F0FFFF\t0\t0\t0
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
down0\t0000000A\t00000000\t0000\t0\t0\t0\t00FFFFFF\t0\t0\t0
lo\t000012AC\t00000000\t0201\t0\t0\t0\t0000FFFF\t0\t0\t0
garbled line
";

    /// fd00::/8 and fd00:0:0:1::/64 on links, the rest by a gateway; and the kernel's own route that rejects.
    fn v6_table() -> String {
        let row = |destination: &str, length: &str, metric: &str, flags: &str, interface: &str| {
            let zeros = "0".repeat(32);
            format!("{destination:0<32} {length} {zeros} 00 {zeros} {metric} 00000001 00000000 {flags} {interface}\n")
        };
        [
            row("fd", "08", "00000100", "00000001", "ens5"),
            row("fd00000000000001", "40", "00000100", "00000001", "ens7"),
            row("", "00", "00000400", "00000003", "ens5"),
            row("", "00", "00000000", "00200200", "lo"),
        ]
        .concat()
    }

    #[test]
    fn the_route_with_the_longest_prefix_and_the_lowest_metric_leads() {
        let v4 = |text: &str| route_v4(V4, text.parse().unwrap());
        assert_eq!(v4("10.0.15.255").as_deref(), Some("ens5"));
        assert_eq!(v4("10.0.16.1").as_deref(), Some("ens6"), "outside of the subnet: the cheaper gateway");
        assert_eq!(v4("172.17.3.4").as_deref(), Some("docker0"));
        assert_eq!(v4("172.18.3.4").as_deref(), Some("ens6"), "a route that rejects is none");
        assert_eq!(route_v4("", Ipv4Addr::LOCALHOST), None);
        let table = v6_table();
        let v6 = |text: &str| route_v6(&table, text.parse().unwrap());
        assert_eq!(v6("fd00:0:0:1::9").as_deref(), Some("ens7"));
        assert_eq!(v6("fd00:0:0:2::9").as_deref(), Some("ens5"));
        assert_eq!(v6("2001:db8::1").as_deref(), Some("ens5"));
        assert_eq!(route_v6(&table[..table.len() / 4], "2001:db8::1".parse().unwrap()), None);
    }

    #[test]
    fn the_tables_are_read_below_a_root() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("proc/net")).unwrap();
        std::fs::write(root.path().join("proc/net/route"), V4).unwrap();
        assert_eq!(interface(root.path(), "10.0.0.9".parse().unwrap()).as_deref(), Some("ens5"));
        assert_eq!(interface(root.path(), "127.0.0.2".parse().unwrap()).as_deref(), Some("lo"));
        assert_eq!(interface(root.path(), "fd00::1".parse().unwrap()), None);
    }
}
