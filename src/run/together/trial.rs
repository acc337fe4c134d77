//! A node whose saves failed comes back, and is asked to take part again only after a while.
//!
//! Whoever forms a generation hears of it from the node itself, and goes on without it while there are enough others.
//! So a machine that can't reach the store costs a group its checkpoints once in a while, and not for ever; and one
//! that could not for a moment is not lost.

use std::time::Duration;

use tokio::time::Instant;

use super::desk::{Desk, Tell};
use crate::rendezvous::policy::ending::FAILED_SAVES;

/// How long a node is not trusted after the first time.
const FIRST: Duration = Duration::from_secs(600);
/// The longest such time. It doubles each time.
const LONGEST: Duration = Duration::from_secs(4 * 3600);

/// What a node remembers of its failed saves.
#[derive(Debug, Default)]
pub(super) struct Trial {
    times: u32,
    until: Option<Instant>,
}

fn pause(times: u32) -> Duration {
    FIRST.saturating_mul(1 << times.saturating_sub(1).min(16)).min(LONGEST)
}

impl Trial {
    /// It is left out, or hands over.
    pub(super) fn begins(&mut self, desk: &Desk) {
        self.times = self.times.saturating_add(1);
        self.until = Some(Instant::now() + pause(self.times));
        self.tells(desk);
    }

    /// Tells a desk that was opened since.
    pub(super) fn tells(&self, desk: &Desk) {
        let Some(until) = self.until.filter(|until| *until > Instant::now()) else { return };
        desk.tell(Tell::Fails(FAILED_SAVES));
        let voice = desk.voice();
        tokio::spawn(async move {
            tokio::time::sleep_until(until).await;
            // It may be another desk's time by now.
            let _ = voice.send(Tell::Fails(0));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_fails_again_is_trusted_later() {
        let pauses = [1, 2, 3, 5, 6, u32::MAX].map(|times| pause(times).as_secs() / 60);
        assert_eq!(pauses, [10, 20, 40, 160, 240, 240]);
    }
}
