//! The rate limit: bytes per second over all uploads, in the order of their requests.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;

/// The schedule of the next part. Pure: times count from an epoch that the caller chooses.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    bytes_per_second: f64,
    next: Duration,
}

impl Schedule {
    /// How long a part must still wait.
    fn wait(&self, now: Duration) -> Duration {
        self.next.saturating_sub(now)
    }

    /// A part is sent now.
    fn goes(&mut self, now: Duration, bytes: u64) {
        self.next = self.next.max(now) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
    }
}

/// A token bucket that holds no more than the part being sent: after a pause one part goes at once, and the next ones
/// wait their turn.
///
/// A waiting upload has taken nothing yet, so giving it up wastes nothing. The queue is first come, first served, so no
/// upload starves.
pub(super) struct RateLimit {
    /// Locked while the first in the queue waits; this makes it a queue.
    schedule: Mutex<Schedule>,
    epoch: Instant,
    bytes_per_second: f64,
}

impl RateLimit {
    /// `None` for no limit.
    pub(super) fn new(mib_per_second: Option<u32>) -> Option<Self> {
        let bytes_per_second = f64::from(mib_per_second.filter(|&rate| rate > 0)?) * f64::from(1 << 20);
        let schedule = Schedule { bytes_per_second, next: Duration::ZERO };
        Some(Self { schedule: Mutex::new(schedule), epoch: Instant::now(), bytes_per_second })
    }

    /// The bytes that pass in half a second. A larger part would occupy the line for longer.
    pub(super) fn smooth_part(&self) -> u64 {
        (self.bytes_per_second / 2.0) as u64
    }

    /// Waits until `bytes` may go.
    pub(super) async fn take(&self, bytes: u64) {
        // The pause under the lock is the limit: the others queue for it, in the order in which they came.
        let mut schedule = self.schedule.lock().await;
        tokio::time::sleep(schedule.wait(self.epoch.elapsed())).await;
        schedule.goes(self.epoch.elapsed(), bytes);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn parts_keep_to_the_limit_and_a_pause_is_not_saved_up() {
        let ms = Duration::from_millis;
        let mut schedule = Schedule { bytes_per_second: (10 * MIB) as f64, next: Duration::ZERO };
        let mut now = ms(3);
        // The first at once, then one each half second, whatever the senders do in between.
        for part in 0..20_u32 {
            let wait = schedule.wait(now);
            assert_eq!(now + wait, ms(3) + ms(500) * part);
            now += wait;
            schedule.goes(now, 5 * MIB);
            now += ms(u64::from(part) * 17 % 400);
        }
        // After two idle minutes still only one part goes at once.
        now += ms(120_000);
        assert_eq!(schedule.wait(now), Duration::ZERO);
        schedule.goes(now, 20 * MIB);
        assert_eq!(schedule.wait(now), ms(2000));
    }

    #[tokio::test]
    async fn who_gives_up_waiting_takes_nothing_and_lets_the_next_in() {
        let limit = RateLimit::new(Some(1)).unwrap();
        limit.take(1 << 40).await;
        let next = limit.schedule.lock().await.next;
        assert!(next > Duration::from_secs(1_000_000));
        // Polled once and dropped, like an upload that is given up; a lock on the queue would make the second hang.
        for _ in 0..2 {
            assert!(limit.take(MIB).now_or_never().is_none());
        }
        assert_eq!(limit.schedule.lock().await.next, next);
        // Two that looked at the schedule at once would both go at the same time.
        let mut first = Box::pin(limit.take(MIB));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(limit.schedule.try_lock().is_err(), "who waits is the only one at the head of the queue");
    }

    #[test]
    fn no_limit_is_none() {
        assert!(RateLimit::new(None).is_none() && RateLimit::new(Some(0)).is_none());
        assert_eq!(RateLimit::new(Some(100)).unwrap().smooth_part(), 50 * MIB);
    }
}
