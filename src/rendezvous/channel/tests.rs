//! Links between nodes that mean well, and what ends them.

use std::time::Duration;

use futures::FutureExt;
use tokio::io::AsyncWriteExt;

use super::{
    frame::{self, Frames},
    testing::{Line, Nodes, PATIENT, Pair, Relay, TestLink, listen, node, over_a_pipe, say, write_text},
    *,
};
use crate::ids::Generation;

#[tokio::test]
async fn both_directions_talk_in_order() {
    let mut pair = Pair::new(PATIENT).await;
    let (mut near, mut far) = pair.link(PATIENT).await;
    assert_eq!((near.peer(), far.peer()), (&pair.host.as_peer(), &pair.guest.as_peer()));
    assert_eq!(near.address(), pair.listener.address());
    for number in 1..=300_u64 {
        say(&mut near, 3, &format!("to {number}")).await;
        say(&mut far, 4, &format!("fro {number}")).await;
    }
    for number in 1..=300_u64 {
        let (to, fro) = (far.recv().await.unwrap(), near.recv().await.unwrap());
        assert_eq!(to, Envelope { generation: Generation(3), seq: number, body: format!("to {number}") });
        assert_eq!(fro, Envelope { generation: Generation(4), seq: number, body: format!("fro {number}") });
    }
}

#[tokio::test]
async fn a_dropped_link_still_says_what_was_queued_and_goodbye() {
    let mut pair = Pair::new(PATIENT).await;
    let text = "x".repeat(100_000);
    for half in ["link", "sender", "receiver"] {
        let (mut near, mut far) = pair.link(PATIENT).await;
        for _ in 0..20 {
            say(&mut near, 1, &text).await;
        }
        // The halves that stay are held to the end.
        let kept = match half {
            "link" => {
                drop(near);
                (None, None)
            }
            "sender" => (None, Some(near.split().1)),
            _ => (Some(near.split().0), None),
        };
        for number in 0..20 {
            assert_eq!(far.recv().await.unwrap().body, text, "{half} dropped, message {number}");
        }
        assert_eq!(far.recv().await.unwrap_err(), End::Closed, "{half} dropped");
        assert_eq!(far.send(Generation(1), &"too late".into()), Err(NotSent::Ended(End::Closed)));
        if let (_, Some(mut receiver)) = kept {
            assert_eq!(receiver.recv().await.unwrap_err(), End::Closed);
        }
    }
}

#[tokio::test]
async fn the_last_words_of_a_peer_come_before_its_end() {
    let mut pair = Pair::new(PATIENT).await;
    let (mut near, far) = pair.link(PATIENT).await;
    let mut far = far;
    say(&mut far, 1, "the life is over").await;
    drop(far);
    // This side finds out while it writes, and still reads what came before.
    while near.send(Generation(1), &"more".repeat(1000)).is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(near.recv().await.unwrap().body, "the life is over");
    let end = near.recv().await.unwrap_err();
    assert!(matches!(end, End::Closed | End::Slow), "{end}");
}

#[tokio::test]
async fn a_killed_process_breaks_its_link_and_refuses_the_next() {
    let mut pair = Pair::new(PATIENT).await;
    let relay = Relay::to(pair.listener.address()).await;
    let (mut near, mut far) = pair.link_through(relay.address, PATIENT).await;
    say(&mut near, 1, "last").await;
    assert_eq!(far.recv().await.unwrap().body, "last");
    relay.line.send(Line::Break).unwrap();
    for link in [&mut near, &mut far] {
        let end = link.recv().await.unwrap_err();
        assert!(matches!(end, End::Lost(_)), "{end}");
    }
    let address = pair.listener.address();
    let Pair { host, guest, listener, .. } = pair;
    drop(listener);
    // The port closes when the task that holds it has been dropped.
    loop {
        match dial::<String, String>(address, &host.as_peer(), &guest, PATIENT).await {
            Err(End::Refused(refused)) => break assert_eq!(refused, address),
            other => assert!(matches!(other, Err(End::Lost(_))), "{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_machine_that_says_nothing_is_silent_on_both_sides() {
    let short = LinkSettings { ping: Duration::from_millis(50), silence: Duration::from_secs(2), ..PATIENT };
    let mut pair = Pair::new(short).await;
    let relay = Relay::to(pair.listener.address()).await;
    let (mut near, mut far) = pair.link_through(relay.address, short).await;
    say(&mut near, 1, "last").await;
    assert_eq!(far.recv().await.unwrap().body, "last");
    relay.line.send(Line::Hold).unwrap();
    assert_eq!(near.recv().await.unwrap_err(), End::Silent);
    assert_eq!(far.recv().await.unwrap_err(), End::Silent);
}

#[tokio::test]
async fn a_dial_that_nobody_answers_is_silent() {
    // The kernel accepts, and no process does.
    let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hasty = LinkSettings { handshake: Duration::from_millis(100), ..PATIENT };
    let (host, guest) = (node("host"), node("guest"));
    let dialled = dial::<String, String>(port.local_addr().unwrap(), &host.as_peer(), &guest, hasty).await;
    assert_eq!(dialled.unwrap_err(), End::Silent);
}

#[tokio::test]
async fn a_link_with_nothing_to_say_pings_and_hears_pings() {
    let short = LinkSettings { ping: Duration::from_millis(20), ..PATIENT };
    let (_link, mut far) = over_a_pipe(1 << 10, short);
    let mut frames = Frames::default();
    for _ in 0..5 {
        assert_eq!(frames.next(&mut far, 100, PATIENT.silence).await.unwrap().as_ref(), b"\"ping\"");
    }
    // Pings over more than the allowed silence keep a link.
    let short = LinkSettings { silence: Duration::from_secs(1), ..PATIENT };
    let (mut link, mut far) = over_a_pipe(1 << 10, short);
    let begun = tokio::time::Instant::now();
    let mut beat = tokio::time::interval(Duration::from_millis(50));
    while begun.elapsed() < 2 * short.silence {
        beat.tick().await;
        write_text(&mut far, "\"ping\"").await;
    }
    write_text(&mut far, r#"{"message":{"generation":1,"seq":1,"body":"still here"}}"#).await;
    assert_eq!(link.recv().await.unwrap().body, "still here");
    assert_eq!(link.recv().await.unwrap_err(), End::Silent);
}

#[tokio::test]
async fn a_number_that_does_not_rise_ends_the_link() {
    for (numbers, told) in [(&[1, 5, 5][..], 2), (&[7, 6], 1), (&[0], 0), (&[u64::MAX, 0], 1)] {
        let (mut link, mut far) = over_a_pipe(1 << 10, PATIENT);
        for seq in numbers {
            write_text(&mut far, &format!(r#"{{"message":{{"generation":1,"seq":{seq},"body":"x"}}}}"#)).await;
        }
        for number in &numbers[..told] {
            assert_eq!(link.recv().await.unwrap().seq, *number);
        }
        let end = link.recv().await.unwrap_err();
        assert!(matches!(&end, End::Protocol(text) if text.contains("came after")), "{numbers:?}: {end}");
    }
}

#[tokio::test]
async fn what_is_no_message_ends_the_link() {
    let over = u32::try_from(MAX_MESSAGE + 1).unwrap().to_le_bytes();
    let framed = |content: &[u8]| [&u32::try_from(content.len()).unwrap().to_le_bytes(), content].concat();
    for bytes in [
        framed(b"{"),
        framed(b""),
        framed(&[0xff; 64]),
        framed(b"\"pong\""),
        framed(br#"{"message":{"generation":1,"seq":1}}"#),
        framed(br#"{"message":{"generation":1,"seq":-1,"body":"x"}}"#),
        framed("[".repeat(100_000).as_bytes()),
        over.to_vec(),
        (1_u32 << 30).to_le_bytes().to_vec(),
    ] {
        let (mut link, mut far) = over_a_pipe(1 << 20, PATIENT);
        far.write_all(&bytes).await.unwrap();
        let end = link.recv().await.unwrap_err();
        assert!(matches!(end, End::Protocol(_)), "{:?}: {end}", &bytes[..bytes.len().min(20)]);
    }
}

#[tokio::test]
async fn a_message_that_is_too_long_is_the_senders_fault_and_the_link_stands() {
    let mut pair = Pair::new(PATIENT).await;
    let (mut near, mut far) = pair.link(PATIENT).await;
    let mut text = "x".repeat(MAX_MESSAGE);
    let fault = near.send(Generation(1), &text).unwrap_err();
    assert!(matches!(fault, NotSent::Message(Unsendable::TooLong(len)) if len > MAX_MESSAGE), "{fault}");
    let empty = frame::encode(&serde_json::json!({"message": {"generation": 1, "seq": 1, "body": ""}}), MAX_MESSAGE);
    text.truncate(MAX_MESSAGE - (empty.unwrap().len() - frame::PREFIX));
    near.send(Generation(1), &text).unwrap();
    let message = far.recv().await.unwrap();
    assert_eq!((message.seq, message.body.len()), (1, text.len()));
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_cut_when_the_queue_is_full() {
    let narrow = LinkSettings { queue: 8, queue_bytes: 1000, ..PATIENT };
    // By number and by bytes.
    for (text, most) in [("x".to_owned(), 9), ("x".repeat(300), 3)] {
        let (mut link, _far) = over_a_pipe(16, narrow);
        let mut sent = 0;
        let end = loop {
            match link.send(Generation(1), &text) {
                Ok(()) => sent += 1,
                Err(end) => break end,
            }
            tokio::task::yield_now().await;
            assert!(sent <= most, "{sent} messages wait");
        };
        assert_eq!(end, NotSent::Ended(End::Slow));
        assert_eq!(link.recv().await.unwrap_err(), End::Slow);
        assert_eq!(link.send(Generation(1), &text).unwrap_err(), NotSent::Ended(End::Slow));
    }
}

#[tokio::test]
async fn room_in_the_queue_comes_back_as_the_peer_reads() {
    let narrow = LinkSettings { queue: 2, queue_bytes: 1000, ..PATIENT };
    let (mut link, mut far) = over_a_pipe(16, narrow);
    let mut frames = Frames::default();
    for _ in 0..50 {
        link.send(Generation(1), &"x".repeat(300)).unwrap();
        while frames.next(&mut far, MAX_MESSAGE, PATIENT.silence).await.unwrap().as_ref() == b"\"ping\"" {}
    }
}

#[tokio::test]
async fn a_peer_that_takes_nothing_for_too_long_is_cut_though_the_queue_has_room() {
    let short = LinkSettings { silence: Duration::from_millis(200), linger: Duration::from_millis(50), ..PATIENT };
    let (mut link, mut far) = over_a_pipe(16, short);
    link.send(Generation(1), &"x".repeat(100)).unwrap();
    // It is heard all the while.
    let talking = async {
        let mut beat = tokio::time::interval(Duration::from_millis(20));
        loop {
            beat.tick().await;
            let _ = far.write_all(&frame::encode(&"ping", 100).unwrap()).await;
        }
    };
    let end = tokio::select! {
        end = link.recv() => end.unwrap_err(),
        () = talking => unreachable!(),
    };
    assert_eq!(end, End::Slow);
}

#[tokio::test]
async fn an_owner_that_does_not_take_its_messages_loses_its_peer_and_none_of_what_came() {
    let mut pair = Pair::new(LinkSettings { inbox: 1, ..PATIENT }).await;
    let (mut near, mut far) = pair.link(PATIENT).await;
    let text = "x".repeat(100_000);
    let mut sent = 0;
    while near.send(Generation(1), &text).is_ok() {
        sent += 1;
        tokio::task::yield_now().await;
    }
    assert_eq!(near.recv().await.unwrap_err(), End::Slow);
    let mut got = 0;
    while let Ok(message) = far.recv().await {
        got += 1;
        assert_eq!((message.seq, message.body.len()), (got, text.len()));
    }
    assert!(got >= 1 && got <= sent, "{got} of {sent}");
}

#[tokio::test]
async fn a_slow_owner_gets_everything() {
    let mut pair = Pair::new(LinkSettings { inbox: 1, ..PATIENT }).await;
    let (mut near, mut far) = pair.link(PATIENT).await;
    for number in 0..500 {
        say(&mut near, 1, &number.to_string()).await;
    }
    for number in 0..500 {
        assert_eq!(far.recv().await.unwrap().body, number.to_string());
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn dropped_futures_lose_nothing() {
    let mut pair = Pair::new(PATIENT).await;
    let address = pair.listener.address();
    let Pair { host, guest, listener, .. } = &mut pair;
    let host = host.as_peer();
    let (dialled, mut accepted) = tokio::join!(dial::<String, String>(address, &host, guest, PATIENT), async {
        loop {
            // Each round drops the future of the one before.
            tokio::select! {
                biased;
                link = listener.accept() => break link,
                () = tokio::task::yield_now() => {}
            }
        }
    });
    let mut near = dialled.unwrap();
    let talking = async {
        for number in 0..1000 {
            say(&mut near, 1, &number.to_string()).await;
            tokio::task::yield_now().await;
        }
        near
    };
    let listening = async {
        let mut got = Vec::new();
        while got.len() < 1000 {
            tokio::select! {
                biased;
                message = accepted.recv() => got.push(message.unwrap().body),
                () = tokio::task::yield_now() => {}
            }
        }
        got
    };
    let (_near, got) = tokio::join!(talking, listening);
    assert_eq!(got, (0..1000).map(|number| number.to_string()).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_link_outlives_its_listener() {
    let mut pair = Pair::new(PATIENT).await;
    let (mut near, mut far) = pair.link(PATIENT).await;
    drop(pair.listener);
    say(&mut near, 1, "still").await;
    assert_eq!(far.recv().await.unwrap().body, "still");
}

#[tokio::test]
async fn a_node_that_becomes_known_gets_in() {
    let pair = Pair::new(PATIENT).await;
    let newcomer = node("newcomer");
    let (address, host) = (pair.listener.address(), pair.host.as_peer());
    let refused = dial::<String, String>(address, &host, &newcomer, PATIENT).await.unwrap_err();
    assert_eq!(refused, End::NotKnown);
    pair.nodes.add(&newcomer);
    let mut listener = pair.listener;
    let _near: TestLink = dial(address, &host, &newcomer, PATIENT).await.unwrap();
    assert_eq!(*listener.accept().await.peer(), newcomer.as_peer());
}

#[tokio::test]
async fn a_node_finds_out_whether_its_address_leads_to_itself() {
    let mut pair = Pair::new(PATIENT).await;
    let here = pair.listener.address();
    assert_eq!(address::answers(here, &pair.host, PATIENT).await, Ok(()));
    // Another process has the port there.
    let other = listen(&pair.guest, &Nodes::of(&[&pair.host]), PATIENT).await;
    let there = other.address();
    assert_eq!(address::answers(there, &pair.host, PATIENT).await, Err(End::OtherKey(there)));
    pair.is_undisturbed().await;
    assert!(pair.listener.accept().now_or_never().is_none());
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_error_of_the_bind() {
    let pair = Pair::new(PATIENT).await;
    let again =
        Listener::<String, String>::bind(pair.listener.address(), pair.guest.clone(), pair.nodes.known(), PATIENT);
    assert_eq!(again.await.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
}

#[tokio::test]
async fn nodes_of_another_version_or_run_stay_outside_with_the_reason() {
    let mut pair = Pair::new(PATIENT).await;
    let (address, host) = (pair.listener.address(), pair.host.as_peer());
    let mut other = (*pair.guest).clone();
    other.version = "0.0.9".into();
    let end = dial::<String, String>(address, &host, &other, PATIENT).await.unwrap_err();
    assert!(matches!(&end, End::Version { node, theirs, ours } if node.as_str() == "host"
        && theirs.version == env!("CARGO_PKG_VERSION") && ours.version == "0.0.9"));
    let mut other = (*pair.guest).clone();
    other.run = crate::ids::RunId::new("another").unwrap();
    let end = dial::<String, String>(address, &host, &other, PATIENT).await.unwrap_err();
    assert!(matches!(&end, End::OtherRun { theirs, .. } if theirs == "run"), "{end}");
    pair.is_undisturbed().await;
}
