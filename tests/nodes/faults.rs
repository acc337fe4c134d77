//! The faults of a network, as rules of nftables: plain values in, text out.
//!
//! Places are numbered: [`STORE`] is the store's, nodes count from 1. Place N sits at port `pN` of the hub's bridge,
//! with the address `10.99.0.(N+1)`. Rules of the bridge drop IP packets on their way through the hub, so neither end
//! notices anything but silence. Resets come from the receiver's own namespace: this kernel's bridge can't send any.
//! A text replaces all earlier rules of its table in one transaction.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::Ipv4Addr,
};

/// The place of the store.
pub const STORE: usize = 0;

/// The address of a place.
pub fn address(place: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, u8::try_from(place + 1).expect("a small network"))
}

/// Its other address, which is routed over the same cable: see `net`.
pub fn loopback(place: usize) -> Ipv4Addr {
    let [_, network, subnet, last] = address(place).octets();
    [127, network, subnet, last].into()
}

/// What is broken now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Places that nothing reaches or leaves.
    pub cut: BTreeSet<usize>,
    /// Packets from the first place to the second are dropped.
    pub dropped: BTreeSet<(usize, usize)>,
    /// TCP segments from the first place to the second are answered with RST.
    pub reset: BTreeSet<(usize, usize)>,
    /// The share of packets, in percent, that is lost on its way to a place, and again on its way from it.
    pub loss: BTreeMap<usize, u8>,
}

impl Faults {
    /// Removes every fault that concerns this place.
    pub fn heal(&mut self, place: usize) {
        self.cut.remove(&place);
        self.loss.remove(&place);
        self.dropped.retain(|(from, to)| ![*from, *to].contains(&place));
        self.reset.retain(|(from, to)| ![*from, *to].contains(&place));
    }

    /// The rules of the hub's bridge.
    pub fn of_the_hub(&self) -> String {
        let mut rules = String::new();
        let mut rule = |matches: &str| {
            writeln!(rules, "add rule bridge nodes through {matches} drop").expect("a string takes it");
        };
        for place in &self.cut {
            rule(&format!("iifname \"p{place}\""));
            rule(&format!("oifname \"p{place}\""));
        }
        for (from, to) in &self.dropped {
            rule(&format!("iifname \"p{from}\" oifname \"p{to}\""));
        }
        for (place, percent) in &self.loss {
            rule(&format!("iifname \"p{place}\" numgen random mod 100 < {percent}"));
            rule(&format!("oifname \"p{place}\" numgen random mod 100 < {percent}"));
        }
        table("bridge", "forward", &rules)
    }

    /// The rules of a place's own namespace.
    pub fn of(&self, place: usize) -> String {
        let mut rules = String::new();
        for (from, _) in self.reset.iter().filter(|(_, to)| *to == place) {
            let from = format!("{{ {}, {} }}", address(*from), loopback(*from));
            writeln!(rules, "add rule inet nodes through ip saddr {from} meta l4proto tcp reject with tcp reset")
                .expect("a string takes it");
        }
        table("inet", if rules.is_empty() { "" } else { "input" }, &rules)
    }
}

/// A table of this family with these rules and no others; without a hook: no table.
fn table(family: &str, hook: &str, rules: &str) -> String {
    // A table that does not exist can't be deleted, so it is made first.
    let none = format!("add table {family} nodes\ndelete table {family} nodes\n");
    if hook.is_empty() {
        return none;
    }
    let chain = format!("add chain {family} nodes through {{ type filter hook {hook} priority 0; }}");
    format!("{none}add table {family} nodes\n{chain}\n{rules}")
}

#[test]
fn faults_become_rules_and_healing_removes_those_of_one_place_only() {
    let mut faults = Faults::default();
    assert!(!faults.of_the_hub().contains("drop"), "{}", faults.of_the_hub());
    faults.cut.insert(1);
    faults.dropped.extend([(1, 2), (3, STORE)]);
    faults.reset.extend([(2, 1), (3, 2)]);
    faults.loss.insert(2, 30);
    let drops = |faults: &Faults| faults.of_the_hub().lines().filter(|line| line.ends_with(" drop")).count();
    assert_eq!(drops(&faults), 2 + 2 + 2, "{}", faults.of_the_hub());
    assert!(faults.of_the_hub().contains("iifname \"p3\" oifname \"p0\" drop"), "{}", faults.of_the_hub());
    assert!(faults.of_the_hub().contains("oifname \"p2\" numgen random mod 100 < 30 drop"));
    assert!(faults.of(1).contains("ip saddr { 10.99.0.3, 127.99.0.3 } meta l4proto tcp reject"), "{}", faults.of(1));
    assert!(!faults.of(3).contains("reject"), "{}", faults.of(3));
    faults.heal(1);
    let left =
        Faults { dropped: [(3, STORE)].into(), reset: [(3, 2)].into(), loss: [(2, 30)].into(), ..Faults::default() };
    assert_eq!(faults, left);
    [2, 3].iter().for_each(|place| faults.heal(*place));
    assert_eq!(faults, Faults::default());
}
