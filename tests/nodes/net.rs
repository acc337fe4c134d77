//! Machines of a test: network namespaces on a bridge that lies in a namespace of its own.
//!
//! Each place of a [`Network`] (the store's and every node's) is a process that holds a network, a mount and a host
//! name namespace. In it: `lo`, `169.254.169.254` on `lo` for a metadata service, and `eth0`, whose other end is a port
//! of the hub's bridge. It has a boot id of its own, so that no node takes a process of another one for a process of
//! its machine. It shares the file system and the process ids: tests signal processes as always.
//!
//! The program takes an unencrypted store at a loopback address only. So every place has a second address, in
//! `127.99.0.0/24`, and that network is routed over the cable like the first: of `lo` only 127.0.0.1 is left.
//!
//! Every place knows the hardware address of every other one, as if a cloud's network answered for it. So a place
//! that is gone is silence, and never "no route to host".
//!
//! Nothing here has a name on the machine, so nothing can be left behind: namespaces end with the last process in
//! them, and a holder ends when its standard input does, which is a pipe from this process. Networks of several tests
//! can't meet, and have the same addresses.
//!
//! Where a user may not make namespaces, a test runs again in a process that is root in a user namespace of its own
//! ([`on_network`]). Where that is not possible either, or a tool is missing, places are addresses of the loopback
//! device: servers and programs run, but nothing can be cut, and tests of that say so and pass.

use std::{
    fmt::Write as _,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::faults::{Faults, address, loopback};
use crate::support::{lab::scratch, trainer::Trainer};

/// The most nodes of one network.
const MOST: usize = 16;
/// The limit for each command that changes a network, seconds.
const COMMAND_S: &str = "60";
/// The limit for a test in a process of its own, seconds.
const TEST_S: &str = "900";
/// Which way to take: `here`, `user-namespace`, `loopback`. Without it: the first one that works.
const WAY: &str = "TRAINER_TEST_NODES";

/// What a namespace of nodes needs; it fails where anything is missing.
const PROBE: &str = "set -e
ip link set lo up
ip link add name hub type bridge
ip link add name port type veth peer name eth0
tc qdisc add dev port root tbf rate 8mbit burst 32kb latency 400ms
nft -f - <<END
add table bridge probe
add chain bridge probe through { type filter hook forward priority 0; }
add rule bridge probe through iifname \"port\" numgen random mod 100 < 1 drop
add table inet probe
add chain inet probe through { type filter hook input priority 0; }
add rule inet probe through meta l4proto tcp reject with tcp reset
END
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
hostname probe
mount --bind /dev/null /proc/sys/kernel/random/boot_id
nsenter --net=/proc/$$/ns/net --mount=/proc/$$/ns/mnt --uts=/proc/$$/ns/uts true
";

/// What a machine is before it has a cable; its host name and the file with its boot id.
const MACHINE: &str = "ip link set lo up
ip addr del 127.0.0.1/8 dev lo
ip addr add 127.0.0.1/32 dev lo
ip addr add 169.254.169.254/32 dev lo
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
hostname \"$1\"
mount --bind \"$2\" /proc/sys/kernel/random/boot_id";

/// How this machine lets a test have nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    /// This process may make namespaces.
    Here,
    /// It may make a user namespace, and namespaces in that.
    UserNamespace,
    /// Neither, and why.
    Loopback(String),
}

fn way() -> &'static Way {
    static WAYS: OnceLock<Way> = OnceLock::new();
    WAYS.get_or_init(|| {
        let wanted = std::env::var(WAY).unwrap_or_default();
        if wanted == "loopback" {
            return Way::Loopback(format!("{WAY}={wanted}"));
        }
        let mut why = String::new();
        for (name, way, more) in
            [("here", Way::Here, &[][..]), ("user-namespace", Way::UserNamespace, &["--user", "--map-root-user"])]
        {
            if wanted.is_empty() || wanted == name {
                match probe(more) {
                    Ok(()) => return way,
                    Err(error) => why = error,
                }
            }
        }
        Way::Loopback(why)
    })
}

/// A program of the system; those of administrators are not in every user's path.
fn tool(program: &str) -> Command {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command.env("PATH", path);
    command
}

/// Whether namespaces can be made with these options of `unshare`; else why not.
fn probe(more: &[&str]) -> Result<(), String> {
    let mut command = tool("timeout");
    command.args([COMMAND_S, "unshare"]).args(more);
    command.args(["--net", "--mount", "--uts", "--propagation", "private", "sh", "-c", PROBE]);
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("timeout: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no reason was given");
    if output.status.success() { Ok(()) } else { Err(last.trim().to_owned()) }
}

/// Runs `test` on a new network of `count` nodes; it must be the whole body of a test.
///
/// A user who may not make namespaces runs the same test again, in another process, which is root in a user namespace:
/// threads can't enter a namespace that belongs to another user namespace than theirs.
pub fn on_network<F: FnOnce(&Network)>(count: usize, test: F) {
    match way() {
        Way::UserNamespace => run_as_root_of_a_user_namespace(test_name::<F>()),
        way => test(&Network::new(count, way)),
    }
}

/// The name of the test whose closure has this type.
fn test_name<F>() -> &'static str {
    let path = std::any::type_name::<F>();
    let (_, path) = path.split_once("::").expect("a path below this crate");
    path.split("::{{closure}}").next().expect("split yields one part")
}

/// Runs one test of this binary again, as root of a user namespace. `false`: this machine has no such namespaces.
pub fn passes_in_a_user_namespace(name: &str) -> bool {
    let possible = probe(&["--user", "--map-root-user"]).is_ok();
    if possible {
        run_as_root_of_a_user_namespace(name);
    }
    possible
}

fn run_as_root_of_a_user_namespace(name: &str) {
    let this = std::env::current_exe().expect("path of this binary");
    let output = tool("timeout")
        .args([TEST_S, "unshare", "--user", "--map-root-user", "--net", "--mount", "--propagation", "private"])
        .args(["sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
        .arg(this)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(WAY, "here")
        .stdin(Stdio::null())
        .output()
        .expect("start this binary again");
    let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{name} in a user namespace\n{said}\n{told}");
    // What it reports, and what it skips.
    eprint!("{told}");
}

/// A process that holds namespaces until its standard input ends.
struct Holder {
    child: Child,
}

impl Holder {
    /// Starts one; `script` prepares the namespaces.
    fn start(script: &str, arguments: &[&str]) -> Self {
        let script = format!("set -e\n{script}\necho ready\nexec cat");
        let child = tool("unshare")
            .args(["--net", "--mount", "--uts", "--propagation", "private", "sh", "-c", &script, "sh"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start unshare");
        Self { child }
    }
    /// Waits until its namespaces are prepared.
    fn ready(&mut self) {
        let mut line = String::new();
        let _ = BufReader::new(self.child.stdout.take().expect("piped")).read_line(&mut line);
        if line.trim() != "ready" {
            let mut why = String::new();
            let _ = self.child.stderr.take().expect("piped").read_to_string(&mut why);
            panic!("no namespace: {why}");
        }
    }
    fn namespace(&self, kind: &str) -> String {
        format!("/proc/{}/ns/{kind}", self.child.id())
    }
    /// Runs a program in its network, with this input; fails if the program does.
    #[track_caller]
    fn run(&self, program: &[&str], input: &str) -> String {
        let mut child = tool("timeout")
            .args([COMMAND_S, "nsenter", &format!("--net={}", self.namespace("net"))])
            .args(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start a command");
        // These inputs fit into a pipe. A program that ends early says why on standard error.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        let output = child.wait_with_output().expect("wait for a command");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program:?}: {said}\n{input}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One machine: a node's or the store's.
pub struct Place {
    address: Ipv4Addr,
    loopback: Ipv4Addr,
    /// Its holder, and its network namespace; `None` on the loopback device.
    real: Option<(Holder, File)>,
}

impl Place {
    /// Its address, at which the others reach it.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
    /// Runs `work` on a thread of its own that is in this place's network. Sockets made there stay there, whoever uses
    /// them later; threads that it starts are there, too.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                if let Some((_, network)) = &self.real {
                    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                        .expect("enter a network namespace");
                }
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
    /// A listener at its address, on a free port.
    pub fn listen(&self) -> TcpListener {
        self.listen_at(SocketAddr::from((self.address, 0)))
    }
    /// A listener at the address that the program takes for a loopback address, on a free port.
    pub fn listen_for_store(&self) -> TcpListener {
        self.listen_at(SocketAddr::from((self.loopback, 0)))
    }
    /// A listener where machines of a cloud find their metadata service.
    pub fn listen_for_metadata(&self) -> TcpListener {
        self.listen_at(SocketAddr::from(([169, 254, 169, 254], 80)))
    }
    fn listen_at(&self, address: SocketAddr) -> TcpListener {
        self.enter(|| TcpListener::bind(address)).unwrap_or_else(|error| panic!("listen at {address}: {error}"))
    }
    /// The beginning of a command that runs here, in `folder`; empty on the loopback device.
    fn prefix(&self, folder: &Path) -> Vec<String> {
        let Some((holder, _)) = &self.real else { return Vec::new() };
        let names = [("net", "net"), ("mount", "mnt"), ("uts", "uts")];
        let options = names.map(|(option, kind)| format!("--{option}={}", holder.namespace(kind)));
        let folder = format!("--wdns={}", folder.display());
        std::iter::once("nsenter".to_owned()).chain(options).chain([folder]).collect()
    }
    /// The trainer runs on this machine. `folder`: the one in which it was to work.
    pub fn trainer(&self, trainer: Trainer, folder: &Path) -> Trainer {
        let prefix = self.prefix(folder);
        let prefix: Vec<&str> = prefix.iter().map(String::as_str).collect();
        if prefix.is_empty() { trainer } else { trainer.within(&prefix) }
    }
    /// Runs a program on this machine, and returns what it says; fails if the program does.
    #[track_caller]
    pub fn run(&self, program: &[&str]) -> String {
        let command: Vec<String> =
            self.prefix(Path::new("/")).into_iter().chain(program.iter().map(|word| (*word).to_owned())).collect();
        let mut process = tool("timeout");
        let output = process.arg(COMMAND_S).args(&command).stdin(Stdio::null()).output().expect("start a program");
        let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command:?}: {said}{told}");
        said.into_owned()
    }
}

/// A store's place, nodes, and the hub between them. It ends with this value, or with this process.
///
/// Faults hold until [`heal`](Self::heal). They are silence, unless they say otherwise: no connection ends by them.
pub struct Network {
    places: Vec<Place>,
    faults: Mutex<Faults>,
    hub: Result<Holder, String>,
    _boot_ids: Option<tempfile::TempDir>,
}

impl Network {
    fn new(count: usize, way: &Way) -> Self {
        assert!((1..=MOST).contains(&count), "{count} nodes");
        if let Way::Loopback(why) = way {
            let place = |number: usize| {
                let [.., last] = address(number).octets();
                Place { address: [127, 0, 0, last].into(), loopback: [127, 0, 0, last].into(), real: None }
            };
            return Self {
                places: (0..=count).map(place).collect(),
                faults: Mutex::default(),
                hub: Err(why.clone()),
                _boot_ids: None,
            };
        }
        let boot_ids = tempfile::Builder::new().prefix("nodes-").tempdir_in(scratch()).expect("folder of boot ids");
        let machine = |number: usize| {
            let path = boot_ids.path().join(number.to_string());
            std::fs::write(&path, format!("{number:08x}-7e57-4000-8000-{:012x}\n", std::process::id()))
                .expect("write a boot id");
            Holder::start(MACHINE, &[&host_name(number), path.to_str().expect("a path in UTF-8")])
        };
        let mut hub = Holder::start("ip link set lo up", &[]);
        let mut holders: Vec<Holder> = (0..=count).map(machine).collect();
        std::iter::once(&mut hub).chain(&mut holders).for_each(Holder::ready);
        hub.run(&["ip", "-batch", "-"], &of_the_hub(&holders));
        let place = |(number, holder): (usize, Holder)| {
            holder.run(&["ip", "-batch", "-"], &of_a_machine(number, count));
            let network = File::open(holder.namespace("net")).expect("a network namespace");
            Place { address: address(number), loopback: loopback(number), real: Some((holder, network)) }
        };
        let places = holders.into_iter().enumerate().map(place).collect();
        Self { places, faults: Mutex::default(), hub: Ok(hub), _boot_ids: Some(boot_ids) }
    }

    /// A machine: [`STORE`](super::faults::STORE), or a node, counted from 1.
    pub fn place(&self, number: usize) -> &Place {
        &self.places[number]
    }
    /// Whether this network is real, so that it can be broken; if it is not, this says that `test` is skipped.
    pub fn is_real(&self, test: &str) -> bool {
        if let Err(why) = &self.hub {
            eprintln!("SKIPPED: {test}: no network namespaces here: {why}");
        }
        self.hub.is_ok()
    }
    fn hub(&self) -> &Holder {
        self.hub.as_ref().unwrap_or_else(|why| panic!("the loopback device can't be broken; no namespaces: {why}"))
    }
    fn holder(&self, place: usize) -> &Holder {
        &self.places[place].real.as_ref().expect("a place of a real network").0
    }
    /// Changes the faults. The new rules hold when this returns.
    #[track_caller]
    fn change(&self, change: impl FnOnce(&mut Faults)) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let before = faults.clone();
        change(&mut faults);
        self.hub().run(&["nft", "-f", "-"], &faults.of_the_hub());
        for place in (0..self.places.len()).filter(|place| before.of(*place) != faults.of(*place)) {
            self.holder(place).run(&["nft", "-f", "-"], &faults.of(place));
        }
    }
    /// Nothing reaches this machine or leaves it any more. Its link stays up.
    pub fn cut(&self, place: usize) {
        self.change(|faults| {
            faults.cut.insert(place);
        });
    }
    /// Packets from one machine to another are lost; those of the other direction arrive.
    pub fn cut_one_way(&self, from: usize, to: usize) {
        self.change(|faults| {
            faults.dropped.insert((from, to));
        });
    }
    /// These machines no longer reach each other, in both directions; they reach all others.
    pub fn part(&self, one: usize, other: usize) {
        self.change(|faults| faults.dropped.extend([(one, other), (other, one)]));
    }
    /// Whatever `from` sends to `to` over TCP is answered with a reset. `to` hears nothing of it: for both sides, give
    /// both directions.
    pub fn reset(&self, from: usize, to: usize) {
        self.change(|faults| {
            faults.reset.insert((from, to));
        });
    }
    /// Of the packets to this machine this share is lost, drawn by chance, and of those from it as many; percent.
    pub fn loss(&self, place: usize, percent: u8) {
        assert!((1..100).contains(&percent), "{percent} %: all of them is a cut");
        self.change(|faults| {
            faults.loss.insert(place, percent);
        });
    }
    /// The cable is pulled: no carrier. Connections stay, and nobody hears of it.
    pub fn link_down(&self, place: usize) {
        self.hub().run(&["ip", "link", "set", &port(place), "down"], "");
    }
    /// Ends all faults of this machine, those with another machine included, and plugs the cable in.
    pub fn heal(&self, place: usize) {
        self.change(|faults| faults.heal(place));
        self.hub().run(&["ip", "link", "set", &port(place), "up"], "");
    }
    /// Limits the bandwidth of this machine, bits a second in each direction, in place of an earlier limit.
    pub fn rate(&self, place: usize, bits: u64) {
        // A hundredth of a second's worth, and not less than what the kernel hands over at once.
        let burst = (bits / 8 / 100).max(64 << 10);
        let limit = format!("root tbf rate {bits}bit burst {burst} latency 400ms");
        for (holder, device) in [(self.hub(), port(place)), (self.holder(place), "eth0".to_owned())] {
            let words: Vec<&str> =
                ["tc", "qdisc", "replace", "dev", &device].into_iter().chain(limit.split(' ')).collect();
            holder.run(&words, "");
        }
    }
    /// Bytes that the limit of [`rate`](Self::rate) let through to this machine, and how often it made packets wait.
    pub fn limited(&self, place: usize) -> (u64, u64) {
        let said = self.hub().run(&["tc", "-s", "-j", "qdisc", "show", "dev", &port(place), "root"], "");
        let found: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        let number = |name: &str| found[0][name].as_u64().unwrap_or_else(|| panic!("no {name}: {said}"));
        (number("bytes"), number("overlimits"))
    }
}

/// The name of a place's port at the hub.
fn port(place: usize) -> String {
    format!("p{place}")
}

/// The host name of a place.
fn host_name(place: usize) -> String {
    if place == super::faults::STORE { "store".into() } else { format!("node-{place}") }
}

fn hardware_address(place: usize) -> String {
    format!("02:00:00:00:00:{:02x}", place + 1)
}

/// Commands of `ip` for the hub: a bridge that forwards at once, and a cable to every machine.
fn of_the_hub(machines: &[Holder]) -> String {
    let mut text = "link add name hub type bridge forward_delay 0 mcast_snooping 0\nlink set hub up\n".to_owned();
    for (place, holder) in machines.iter().enumerate() {
        let (port, address, pid) = (port(place), hardware_address(place), holder.child.id());
        writeln!(text, "link add name {port} type veth peer name eth0 address {address} netns {pid}")
            .and_then(|()| writeln!(text, "link set {port} master hub up"))
            .expect("a string takes it");
    }
    text
}

/// Commands of `ip` for a machine.
fn of_a_machine(place: usize, count: usize) -> String {
    let (own, as_loopback) = (address(place), loopback(place));
    let mut text = "link set eth0 addrgenmode none\nlink set eth0 up\n".to_owned();
    writeln!(text, "addr add {own}/24 dev eth0\naddr add {as_loopback}/24 dev eth0").expect("a string takes it");
    for other in (0..=count).filter(|other| *other != place) {
        let hardware = hardware_address(other);
        for address in [address(other), loopback(other)] {
            writeln!(text, "neigh replace {address} lladdr {hardware} dev eth0 nud permanent")
                .expect("a string takes it");
        }
    }
    text
}

/// Network namespaces in which a process is.
fn namespaces() -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("processes").flatten();
    let link = |entry: std::fs::DirEntry| std::fs::read_link(entry.path().join("ns/net")).ok();
    entries.filter_map(link).map(|link| link.display().to_string()).collect()
}

#[test]
fn a_network_ends_with_its_value() {
    on_network(2, |_| {
        let network = Network::new(2, way());
        if !network.is_real("a_network_ends_with_its_value") {
            return;
        }
        let holders: Vec<&Holder> = (0..=2).map(|place| network.holder(place)).chain([network.hub()]).collect();
        let links = holders.iter().map(|holder| std::fs::read_link(holder.namespace("net")).expect("a namespace"));
        let links: Vec<String> = links.map(|link| link.display().to_string()).collect();
        let found = || links.iter().filter(|link| namespaces().contains(link)).count();
        assert_eq!(found(), 4);
        drop(network);
        assert_eq!(found(), 0);
    });
}

#[test]
fn a_holder_ends_with_the_process_that_started_it() {
    on_network(1, |network| {
        if !network.is_real("a_holder_ends_with_the_process_that_started_it") {
            return;
        }
        let mut holder = Holder::start("true", &[]);
        holder.ready();
        assert!(holder.child.try_wait().expect("a child").is_none(), "it waits");
        // The kernel closes this pipe when the process ends, however it ends.
        drop(holder.child.stdin.take());
        assert!(holder.child.wait().expect("a child").success());
    });
}
