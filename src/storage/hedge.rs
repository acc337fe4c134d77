//! A request that hangs is sent a second time, while the first may still be answered.
//!
//! Now and then one connection of many stalls for longer than a machine has left. On a slow link, where every request
//! is slow, giving a request up and starting again would lose all that has arrived; sending it twice costs at most its
//! bytes once more. So writes (each gives the same result when it is done twice) are sent again when they take several
//! times as long as the slowest of the last ones did, and the first answer counts. A store in this machine is never
//! asked twice.
//!
//! A link that has become slow is no connection that hangs: all transfers are slow then, and to send their bytes twice
//! would make the last save late. So a transfer that is not alone is sent again only after another one has finished
//! since it began. Under a rate limit it waits for its turn like any other.
//!
//! *Cancel:* dropping the future drops all of its requests.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::Instant;

use super::rate_limit::RateLimit;

/// The most requests beside the first.
const MORE: u32 = 2;
/// Nothing is sent again before this time.
const LEAST: Duration = Duration::from_secs(2);
/// And not before this many times the duration of the slowest.
const SLOW: u32 = 4;
/// The time for a MiB before anything is measured: that of a line with 4 Mbit/s.
const UNKNOWN: Duration = Duration::from_secs(2);
/// How many of the last transfers are remembered.
const REMEMBERED: usize = 32;
/// Pause between two looks at whether a late transfer hangs.
const LOOK: Duration = Duration::from_millis(250);

/// The duration of transfers: the time per MiB of each of the last ones.
#[derive(Debug, Default)]
pub(super) struct Tempo {
    last: Mutex<VecDeque<Duration>>,
    under_way: AtomicU64,
    finished: AtomicU64,
}

/// One transfer that is under way.
struct Transfer<'a> {
    tempo: &'a Tempo,
    /// Transfers that had finished before it began.
    before: u64,
}

impl<'a> Transfer<'a> {
    fn begin(tempo: &'a Tempo) -> Self {
        tempo.under_way.fetch_add(1, Ordering::Relaxed);
        Self { tempo, before: tempo.finished.load(Ordering::Relaxed) }
    }

    /// Whether other transfers finish: if none does, the link is slow for all.
    fn may_hang(&self) -> bool {
        self.tempo.under_way.load(Ordering::Relaxed) <= 1 || self.tempo.finished.load(Ordering::Relaxed) > self.before
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        self.tempo.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20).max(1)).unwrap_or(u32::MAX)
}

impl Tempo {
    /// A transfer of `bytes` bytes took `time`.
    pub(super) fn took(&self, bytes: u64, time: Duration) {
        self.finished.fetch_add(1, Ordering::Relaxed);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.truncate(REMEMBERED - 1);
        last.push_front(time / mib(bytes));
    }

    /// The time after which such a transfer counts as hanging.
    pub(super) fn hangs_after(&self, bytes: u64) -> Duration {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let slowest = last.iter().max().copied();
        let each = slowest.map_or(UNKNOWN, |slowest| slowest.saturating_mul(SLOW));
        each.saturating_mul(mib(bytes)).max(LEAST)
    }
}

/// The time after which a small request counts as hanging.
pub(super) const SMALL: Duration = LEAST;

/// The first successful answer, of one request and of those that follow it if none came within `hangs_after`, twice
/// that, and so on. If all fail, the last failure.
pub(super) async fn first_success<T, E, R: Future<Output = Result<T, E>>>(
    request: impl FnMut() -> R,
    hangs_after: Duration,
) -> Result<T, E> {
    race(request, || hangs_after, || true).await
}

/// The same for a transfer of `bytes` bytes, which hangs when others come through and `tempo` says so. Each request but
/// the first waits for its turn under `cap`. `tempo` takes the time of the request that was answered: how long another
/// one hung says nothing about the link.
pub(super) async fn first_of_transfers<T, E, R: Future<Output = Result<T, E>>>(
    mut request: impl FnMut() -> R,
    tempo: &Tempo,
    bytes: u64,
    cap: Option<&RateLimit>,
) -> Result<T, E> {
    let transfer = Transfer::begin(tempo);
    let mut first = true;
    let timed = || {
        let (request, cap) = (request(), cap.filter(|_| !std::mem::take(&mut first)));
        async move {
            if let Some(cap) = cap {
                cap.take(bytes).await;
            }
            let begin = Instant::now();
            request.await.map(|answer| (answer, begin.elapsed()))
        }
    };
    let (answer, took) = race(timed, || tempo.hangs_after(bytes), || transfer.may_hang()).await?;
    tempo.took(bytes, took);
    Ok(answer)
}

async fn race<T, E, R: Future<Output = Result<T, E>>>(
    mut request: impl FnMut() -> R,
    hangs_after: impl Fn() -> Duration,
    may_hang: impl Fn() -> bool,
) -> Result<T, E> {
    let began = Instant::now();
    // After one, three and seven times that.
    let due = |sent: u32| began + hangs_after().saturating_mul((2 << sent) - 1);
    let mut under_way = FuturesUnordered::from_iter([request()]);
    let (mut sent, mut next) = (0, due(0));
    loop {
        tokio::select! {
            biased;
            Some(answer) = under_way.next() => match answer {
                // Another request may still be answered.
                Err(_) if !under_way.is_empty() => {}
                answer => return answer,
            },
            () = tokio::time::sleep_until(next), if sent < MORE => {
                // The usual time may have changed meanwhile.
                let (now, due_now) = (Instant::now(), due(sent));
                if now < due_now || !may_hang() {
                    next = due_now.max(now + LOOK);
                    continue;
                }
                sent += 1;
                next = due(sent);
                under_way.push(request());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;

    /// A request in a test: it answers once this many were sent, or never.
    type Plan = (u32, Result<u32, u32>);
    const NEVER: u32 = u32::MAX;

    /// The results of requests that answer like that, in the order in which they are sent, and their number.
    async fn asked(plan: &[Plan]) -> (Result<u32, u32>, u32) {
        let sent = watch::Sender::new(0);
        let request = || {
            let (when, answer) = plan[*sent.borrow() as usize];
            let mut hears = sent.subscribe();
            sent.send_modify(|sent| *sent += 1);
            async move {
                hears.wait_for(|sent| *sent >= when).await.unwrap();
                answer
            }
        };
        let answer = first_success(request, Duration::from_millis(1));
        let answer = tokio::time::timeout(Duration::from_secs(60), answer).await.expect("waits for what never comes");
        let sent = *sent.borrow();
        (answer, sent)
    }

    #[tokio::test]
    async fn a_hanging_request_is_sent_again_and_the_first_success_counts() {
        let plans: [(&[Plan], _, _); 7] = [
            (&[(1, Ok(0))], Ok(0), 1),
            // A request that fails at once is left to the next attempt.
            (&[(1, Err(0))], Err(0), 1),
            (&[(NEVER, Ok(0)), (2, Ok(1))], Ok(1), 2),
            // The first is still waited for.
            (&[(2, Ok(0)), (NEVER, Ok(1))], Ok(0), 2),
            (&[(NEVER, Ok(0)), (NEVER, Ok(1)), (3, Ok(2))], Ok(2), 3),
            // A failure does not count while another request may still be answered.
            (&[(2, Err(0)), (3, Err(1)), (3, Ok(2))], Ok(2), 3),
            (&[(3, Ok(0)), (2, Err(1)), (3, Err(2))], Ok(0), 3),
        ];
        for (plan, answer, sent) in plans {
            assert_eq!(asked(plan).await, (answer, sent), "{plan:?}");
        }
        assert!(matches!(asked(&[(3, Err(0)), (3, Err(0)), (3, Err(0))]).await, (Err(0), 3)), "all have failed");
    }

    #[tokio::test]
    async fn no_more_than_three_are_on_their_way() {
        let mut sent = 0;
        let request = || {
            sent += 1;
            std::future::pending::<Result<(), ()>>()
        };
        let waited = first_success(request, Duration::from_millis(1));
        assert!(tokio::time::timeout(Duration::from_millis(500), waited).await.is_err());
        assert!(sent <= 1 + MORE, "{sent}");
    }

    #[test]
    fn on_a_link_that_is_slow_for_all_no_transfer_hangs() {
        let tempo = Tempo::default();
        let alone = Transfer::begin(&tempo);
        assert!(alone.may_hang());
        let other = Transfer::begin(&tempo);
        assert!(!alone.may_hang() && !other.may_hang(), "neither comes through");
        tempo.took(1, LEAST);
        assert!(alone.may_hang() && other.may_hang(), "a third one did");
        let later = Transfer::begin(&tempo);
        assert!(!later.may_hang(), "that was before");
        drop((alone, other));
        assert!(later.may_hang(), "it is alone");
    }

    #[tokio::test]
    async fn a_transfer_is_not_sent_again_if_all_are_slow() {
        let tempo = Tempo::default();
        let _other = Transfer::begin(&tempo);
        let transfer = Transfer::begin(&tempo);
        let mut sent = 0;
        let request = || {
            sent += 1;
            std::future::pending::<Result<(), ()>>()
        };
        let waited = race(request, || Duration::from_millis(1), || transfer.may_hang());
        assert!(tokio::time::timeout(Duration::from_millis(600), waited).await.is_err());
        assert_eq!(sent, 1);
    }

    #[test]
    fn a_transfer_hangs_when_it_takes_several_times_as_long_as_the_slowest_of_the_last() {
        let (tempo, second) = (Tempo::default(), Duration::from_secs(1));
        assert_eq!(tempo.hangs_after(16 << 20), 32 * second);
        assert_eq!(tempo.hangs_after(0), LEAST);
        tempo.took(16 << 20, 8 * second);
        tempo.took(16 << 20, 2 * second);
        assert_eq!(tempo.hangs_after(16 << 20), 32 * second);
        assert_eq!(tempo.hangs_after(1 << 20), 2 * second);
        for _ in 1..REMEMBERED {
            tempo.took(16 << 20, second);
        }
        assert_eq!(tempo.hangs_after(16 << 20), 8 * second, "the slowest is remembered no more");
        tempo.took(100, second / 1000);
        assert_eq!(tempo.hangs_after(1), LEAST, "a hiccup is no reason");
    }
}
