//! Machines and faults do what they say, proved with plain sockets between namespaces.
//!
//! Silence can't be seen, only waited for: a packet that must not arrive has [`SILENCE`] to do so. The same packet
//! arrives when the fault has ended, and then a wait has the usual generous limit.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use super::{
    STORE,
    net::{Place, on_network, passes_in_a_user_namespace},
};
use crate::support::{
    metadata::{MetadataServer, TOKEN},
    proxy::{FaultProxy, Hang},
    s3::S3Server,
    trainer::LIMIT,
};

/// How long a packet that must not arrive may take to arrive. These networks carry one in less than a millisecond.
const SILENCE: Duration = Duration::from_millis(300);

/// Connects from a machine to an address.
fn connect(from: &Place, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let stream = from.enter(|| TcpStream::connect_timeout(&to, limit))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The kind of failure of a connection that must not come about.
#[track_caller]
fn refused(from: &Place, to: SocketAddr) -> ErrorKind {
    connect(from, to, SILENCE).expect_err("a connection that a fault forbids").kind()
}

/// Two ends of a connection from one machine to another.
fn connected(from: &Place, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let near = connect(from, listener.local_addr().expect("its address"), LIMIT).expect("a connection");
    let (far, _) = listener.accept().expect("the other end");
    far.set_read_timeout(Some(LIMIT)).expect("a limit");
    (near, far)
}

/// Demands that what is written at one end arrives at the other.
#[track_caller]
fn carries(near: &mut TcpStream, far: &mut TcpStream, word: &[u8; 4]) {
    near.write_all(word).expect("write");
    let mut read = [0; 4];
    far.read_exact(&mut read).expect("read");
    assert_eq!(&read, word);
}

fn datagrams(place: &Place) -> UdpSocket {
    place.enter(|| UdpSocket::bind((place.address(), 0))).expect("a socket")
}

/// Whether a datagram arrives within this time.
fn arrives(from: &UdpSocket, to: &UdpSocket, limit: Duration) -> bool {
    from.send_to(b"word", to.local_addr().expect("its address")).expect("send");
    to.set_read_timeout(Some(limit)).expect("a limit");
    to.recv_from(&mut [0; 16]).is_ok()
}

fn address(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("its address")
}

#[test]
fn machines_reach_each_other_and_nothing_else() {
    on_network(3, |network| {
        for (from, to) in [(1, 2), (2, 3), (3, 1), (1, STORE), (STORE, 2)] {
            let listener = network.place(to).listen();
            let (mut near, mut far) = connected(network.place(from), &listener);
            carries(&mut near, &mut far, b"here");
        }
        if !network.is_real("machines_reach_each_other_and_nothing_else") {
            return;
        }
        let outside = TcpListener::bind("127.0.0.1:0").expect("a listener outside");
        assert_eq!(refused(network.place(1), address(&outside)), ErrorKind::ConnectionRefused);
        let elsewhere = refused(network.place(1), ([192, 0, 2, 1], 80).into());
        assert_eq!(elsewhere, ErrorKind::NetworkUnreachable);
        let inside = network.place(1).listen();
        assert!(TcpStream::connect_timeout(&address(&inside), SILENCE).is_err(), "reached from outside");
    });
}

#[test]
fn machines_are_told_apart_by_their_names_and_boots() {
    on_network(2, |network| {
        if !network.is_real("machines_are_told_apart_by_their_names_and_boots") {
            return;
        }
        let seen = |place| {
            let place: &Place = network.place(place);
            let says = |program: &[&str]| place.run(program).trim().to_owned();
            [says(&["hostname"]), says(&["cat", "/proc/sys/kernel/random/boot_id"])]
        };
        let (one, two, store) = (seen(1), seen(2), seen(STORE));
        assert_eq!([&one[0], &two[0], &store[0]], ["node-1", "node-2", "store"]);
        let here = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot id").trim().to_owned();
        assert!(one[1] != two[1] && one[1] != here && two[1] != here, "{one:?} {two:?} {here}");
        assert_eq!(one[1].len(), here.len());
    });
}

#[test]
fn a_cut_is_silence_until_it_is_healed() {
    on_network(2, |network| {
        if !network.is_real("a_cut_is_silence_until_it_is_healed") {
            return;
        }
        let listener = network.place(1).listen();
        let (mut near, mut far) = connected(network.place(2), &listener);
        network.cut(1);
        assert_eq!(refused(network.place(2), address(&listener)), ErrorKind::TimedOut);
        assert_eq!(refused(network.place(1), (network.place(STORE).address(), 9).into()), ErrorKind::TimedOut);
        near.write_all(b"kept").expect("nobody has told this end");
        assert!(is_silent(&mut far));
        // The others are not concerned.
        assert_eq!(refused(network.place(2), (network.place(STORE).address(), 9).into()), ErrorKind::ConnectionRefused);
        network.heal(1);
        let mut read = [0; 4];
        far.set_read_timeout(Some(LIMIT)).expect("a limit");
        far.read_exact(&mut read).expect("the kernel sends it again");
        assert_eq!(&read, b"kept");
        connected(network.place(2), &listener);
    });
}

/// Nothing arrives here, not even the end of the connection.
fn is_silent(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(SILENCE)).expect("a limit");
    let read = stream.read(&mut [0; 16]);
    matches!(read, Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
}

#[test]
fn a_cable_that_is_pulled_ends_no_connection() {
    on_network(2, |network| {
        if !network.is_real("a_cable_that_is_pulled_ends_no_connection") {
            return;
        }
        let listener = network.place(1).listen();
        let (mut near, mut far) = connected(network.place(2), &listener);
        network.link_down(2);
        let link = network.place(2).run(&["ip", "link", "show", "eth0"]);
        assert!(link.contains("NO-CARRIER"), "{link}");
        assert_eq!(refused(network.place(1), (network.place(2).address(), 9).into()), ErrorKind::TimedOut);
        near.write_all(b"kept").expect("nobody has told this end");
        assert!(is_silent(&mut far));
        network.heal(2);
        let mut read = [0; 4];
        far.set_read_timeout(Some(LIMIT)).expect("a limit");
        far.read_exact(&mut read).expect("the kernel sends it again");
        assert_eq!(&read, b"kept");
        carries(&mut far, &mut near, b"back");
    });
}

#[test]
fn one_direction_is_cut_and_the_other_is_not() {
    on_network(3, |network| {
        if !network.is_real("one_direction_is_cut_and_the_other_is_not") {
            return;
        }
        let [one, two, three] = [1, 2, 3].map(|node| datagrams(network.place(node)));
        network.cut_one_way(1, 2);
        assert!(arrives(&two, &one, LIMIT), "the other direction");
        assert!(!arrives(&one, &two, SILENCE), "this direction");
        assert!(arrives(&one, &three, LIMIT) && arrives(&three, &two, LIMIT), "the others");
        // A connection needs both.
        let listener = network.place(1).listen();
        assert_eq!(refused(network.place(2), address(&listener)), ErrorKind::TimedOut);
        network.heal(2);
        assert!(arrives(&one, &two, LIMIT), "healed");
    });
}

#[test]
fn two_parted_machines_reach_all_others() {
    on_network(3, |network| {
        if !network.is_real("two_parted_machines_reach_all_others") {
            return;
        }
        let [store, one, two, three] = [STORE, 1, 2, 3].map(|node| datagrams(network.place(node)));
        network.part(1, 2);
        network.part(1, STORE);
        for (from, to, reached) in [
            (&one, &two, false),
            (&two, &one, false),
            (&one, &store, false),
            (&one, &three, true),
            (&two, &store, true),
        ] {
            assert_eq!(arrives(from, to, if reached { LIMIT } else { SILENCE }), reached);
        }
        network.heal(2);
        assert!(arrives(&one, &two, LIMIT) && arrives(&two, &one, LIMIT), "healed");
        assert!(!arrives(&store, &one, SILENCE), "healed with a machine that was not asked to heal");
    });
}

#[test]
fn a_reset_is_heard_at_once() {
    on_network(2, |network| {
        if !network.is_real("a_reset_is_heard_at_once") {
            return;
        }
        let listener = network.place(2).listen();
        let (mut near, mut far) = connected(network.place(1), &listener);
        network.reset(1, 2);
        let error = connect(network.place(1), address(&listener), LIMIT).expect_err("a connection").kind();
        assert_eq!(error, ErrorKind::ConnectionRefused);
        near.write_all(b"word").expect("the first write is only taken");
        assert_eq!(near.read(&mut [0; 4]).expect_err("an end").kind(), ErrorKind::ConnectionReset);
        assert!(is_silent(&mut far), "the other end hears nothing");
        // It is a matter of these two and of this direction.
        let back = network.place(1).listen();
        let store = network.place(STORE);
        connected(store, &listener);
        assert_eq!(refused(network.place(2), address(&back)), ErrorKind::TimedOut, "its answers are not heard");
        network.heal(1);
        let (mut near, mut far) = connected(network.place(1), &listener);
        carries(&mut near, &mut far, b"well");
    });
}

#[test]
fn a_share_of_the_packets_is_lost() {
    // Fewer than a socket keeps for a reader that comes later.
    const SENT: usize = 100;
    on_network(2, |network| {
        if !network.is_real("a_share_of_the_packets_is_lost") {
            return;
        }
        for (lossy, percent, least, most) in [(1, 30, 40, 98), (2, 30, 40, 98), (1, 90, 0, 30)] {
            let [one, two] = [1, 2].map(|node| datagrams(network.place(node)));
            network.loss(lossy, percent);
            for _ in 0..SENT {
                one.send_to(b"word", two.local_addr().expect("its address")).expect("send");
            }
            network.heal(lossy);
            // Behind all that were sent before it.
            one.send_to(b"end", two.local_addr().expect("its address")).expect("send");
            two.set_read_timeout(Some(LIMIT)).expect("a limit");
            let mut buffer = [0; 16];
            let got = std::iter::from_fn(|| (two.recv(&mut buffer).expect("the end") == 4).then_some(())).count();
            // The mean of 70 has a standard deviation of 4.6, that of 10 one of 3.
            assert!((least..=most).contains(&got), "{got} of {SENT} arrived with {percent} % lost at {lossy}");
        }
        network.loss(1, 20);
        let listener = network.place(2).listen();
        let (mut near, mut far) = connected(network.place(1), &listener);
        (0..20).for_each(|_| carries(&mut near, &mut far, b"kept"));
    });
}

#[test]
fn a_limited_line_makes_packets_wait() {
    const BYTES: usize = 1 << 20;
    const BITS: u64 = 40_000_000;
    on_network(2, |network| {
        if !network.is_real("a_limited_line_makes_packets_wait") {
            return;
        }
        network.rate(2, BITS);
        let listener = network.place(2).listen();
        let (mut near, mut far) = connected(network.place(1), &listener);
        let (seen, waited) = network.limited(2);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| near.write_all(&vec![7; BYTES]).expect("write"));
            far.read_exact(&mut vec![0; BYTES]).expect("read");
        });
        let rate = BYTES as f64 * 8.0 / begun.elapsed().as_secs_f64() / 1e6;
        let (bytes, waits) = network.limited(2);
        eprintln!("a line of {} Mbit/s carried {BYTES} bytes at {rate:.1} Mbit/s", BITS / 1_000_000);
        assert!(bytes - seen >= BYTES as u64, "{bytes} bytes went through the limit");
        assert!(waits > waited, "nothing had to wait");
    });
}

#[test]
fn servers_of_this_process_stand_in_any_machine() {
    on_network(2, |network| {
        let server = S3Server::start();
        let (one, store) = (network.place(1), network.place(STORE));
        let ask = |from: &Place, to: &str, request: &str| {
            let to = to.trim_start_matches("http://").parse().expect("an address");
            let mut stream = connect(from, to, LIMIT).expect("a connection");
            stream.write_all(request.as_bytes()).expect("write");
            stream
        };
        let answer = |mut stream: TcpStream| {
            let mut text = String::new();
            let _ = stream.read_to_string(&mut text);
            text
        };
        let get = "GET /bucket?list-type=2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let said = answer(ask(one, &server.serve_also(store.listen_for_store()), get));
        assert!(said.starts_with("HTTP/1.1 403"), "it checks signatures: {said}");

        let proxy = FaultProxy::start_on(store.listen_for_store(), server.address(), 0);
        proxy.hang(Hang::all("GET", "", ""));
        let mut stream = ask(one, &proxy.endpoint(), get);
        assert!(is_silent(&mut stream), "it hangs");
        assert_eq!(proxy.hung(), 1);
        proxy.let_go();
        let said = answer(ask(one, &proxy.endpoint(), get));
        assert!(said.starts_with("HTTP/1.1 403"), "{said}");

        if !network.is_real("servers_of_this_process_stand_in_any_machine: metadata") {
            return;
        }
        let metadata = [1, 2].map(|node| MetadataServer::start_on(network.place(node).listen_for_metadata()));
        let put = format!("PUT {TOKEN} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let said = answer(ask(network.place(2), "169.254.169.254:80", &put));
        assert!(said.starts_with("HTTP/1.1 400"), "{said}");
        assert_eq!(metadata.map(|server| server.requests().len()), [0, 1], "each machine has its own");
    });
}

#[test]
fn the_bench_stands_in_a_user_namespace_too() {
    for test in ["one_direction_is_cut_and_the_other_is_not", "servers_of_this_process_stand_in_any_machine"] {
        if !passes_in_a_user_namespace(&format!("{}::{test}", module_path!().split_once("::").expect("below").1)) {
            eprintln!("SKIPPED: the_bench_stands_in_a_user_namespace_too: none here");
        }
    }
}
