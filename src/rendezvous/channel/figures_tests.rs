//! Figures of this channel on loopback, printed and not judged:
//! `cargo test --lib --release channel::figures -- --ignored --nocapture`.

use std::time::Duration;

use tokio::time::Instant;

use super::testing::{PATIENT, Pair, say};
use super::*;

/// Processor time of this process's threads so far, in seconds (proc(5), `schedstat`).
fn busy() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let nanos = |task: std::fs::DirEntry| -> Option<f64> {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    tasks.filter_map(nanos).sum::<f64>() / 1e9
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a quarter of a minute and judges nothing"]
async fn figures() {
    const ROUNDS: u32 = 5000;
    const HANDSHAKES: u32 = 500;
    const LINKS: usize = 16;
    const IDLE: Duration = Duration::from_secs(10);
    let mut pair = Pair::new(PATIENT).await;
    let (mut near, mut far) = pair.link(PATIENT).await;
    let echo = tokio::spawn(async move {
        while let Ok(message) = far.recv().await {
            say(&mut far, 1, &message.body).await;
        }
    });
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        say(&mut near, 1, "ping").await;
        near.recv().await.unwrap();
    }
    println!("round trip of one message: {:?}", begun.elapsed() / ROUNDS);
    drop(near);
    echo.await.unwrap();

    let (begun, before) = (Instant::now(), busy());
    for _ in 0..HANDSHAKES {
        pair.link(PATIENT).await;
    }
    let wall = begun.elapsed();
    let rate = f64::from(HANDSHAKES) / wall.as_secs_f64();
    let cpu = 1e6 * (busy() - before) / f64::from(HANDSHAKES);
    println!("handshakes: {rate:.0}/s one after the other, {cpu:.0} µs of processor for both sides");

    let usual = LinkSettings::default();
    let mut pair = Pair::new(usual).await;
    let mut links = Vec::new();
    for _ in 0..LINKS {
        links.push(pair.link(usual).await);
    }
    let before = busy();
    tokio::time::sleep(IDLE).await;
    let share = 100.0 * (busy() - before) / IDLE.as_secs_f64() / 2.0;
    println!("idle with {LINKS} links: {share:.3} % of a core");
}
