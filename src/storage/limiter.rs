//! The queue that bulk requests wait in: first come, first served, as many at once as [`AdaptiveLimit`] allows.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::adaptive_limit::{AdaptiveLimit, Outcome};

struct State {
    adaptive: AdaptiveLimit,
    /// Places to remove as they become free: the limit has fallen below the number in flight.
    debt: usize,
    flying: usize,
}

/// A queue whose width changes.
pub(super) struct Limiter {
    /// For the log.
    name: &'static str,
    places: Semaphore,
    state: Mutex<State>,
    epoch: Instant,
}

impl Limiter {
    pub(super) fn new(name: &'static str, adaptive: AdaptiveLimit) -> Self {
        let places = Semaphore::new(adaptive.limit());
        Self { name, places, state: Mutex::new(State { adaptive, debt: 0, flying: 0 }), epoch: Instant::now() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that may be in flight.
    #[cfg(test)]
    pub(super) fn limit(&self) -> usize {
        self.state().adaptive.limit()
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Waits for a place; `None` if the queue is closed, which it never is.
    pub(super) async fn enter(&self) -> Option<Pass<'_>> {
        let permit = self.places.acquire().await.ok()?;
        let mut state = self.state();
        if state.flying == 0 {
            state.adaptive.wakes(self.now());
        }
        state.flying += 1;
        drop(state);
        Some(Pass { limiter: self, permit: Some(permit), began: self.now() })
    }

    /// Adjusts the number of places to the limit.
    fn fit(&self, state: &mut State, was: usize) {
        let limit = state.adaptive.limit();
        if limit > was {
            let more = limit - was;
            let forgiven = more.min(state.debt);
            state.debt -= forgiven;
            self.places.add_permits(more - forgiven);
        } else {
            let fewer = was - limit;
            state.debt += fewer - self.places.forget_permits(fewer);
        }
    }
}

/// A place in flight. If it is dropped without a call, the request's end is no evidence about the store.
pub(super) struct Pass<'a> {
    limiter: &'a Limiter,
    permit: Option<SemaphorePermit<'a>>,
    began: Duration,
}

impl Pass<'_> {
    /// The request is sent only now: the time before was a wait of our own making.
    pub(super) fn goes(&mut self) {
        self.began = self.limiter.now();
    }

    /// The request's outcome.
    pub(super) fn ended(self, outcome: Outcome) {
        let limiter = self.limiter;
        let mut state = limiter.state();
        let was = state.adaptive.limit();
        let bound = limiter.places.available_permits() == 0;
        if let Some(reason) = state.adaptive.ended(self.began, limiter.now(), bound, outcome) {
            limiter.fit(&mut state, was);
            tracing::debug!(
                direction = limiter.name,
                from = was,
                to = state.adaptive.limit(),
                ?reason,
                "requests at once"
            );
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.limiter.state();
        state.flying = state.flying.saturating_sub(1);
        if state.debt > 0
            && let Some(permit) = self.permit.take()
        {
            state.debt -= 1;
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_request_waited_for_the_rate_limit_is_not_the_stores_time() {
        let limiter = Limiter::new("test", AdaptiveLimit::adaptive(8));
        let mut pass = limiter.enter().await.unwrap();
        let entered = pass.began;
        while limiter.now() == entered {
            std::hint::spin_loop();
        }
        pass.goes();
        assert!(pass.began > entered);
    }

    #[tokio::test]
    async fn places_follow_the_limit_up_and_down() {
        let limiter = Limiter::new("test", AdaptiveLimit::adaptive(8));
        let free = || limiter.places.available_permits();
        let owed_and_flying = || {
            let state = limiter.state();
            (state.debt, state.flying)
        };
        assert_eq!(free(), 4);
        let mut passes = Vec::new();
        for _ in 0..4 {
            passes.push(limiter.enter().await.unwrap());
        }
        passes.pop().unwrap().ended(Outcome::Refused);
        // Two may be in flight, three are.
        assert_eq!((free(), owed_and_flying()), (0, (1, 3)));
        drop(passes.pop());
        assert_eq!((free(), owed_and_flying()), (0, (0, 2)));
        drop(passes);
        assert_eq!((free(), owed_and_flying()), (2, (0, 0)));
        // More places, of which some are owed: the debt is paid first.
        passes = vec![limiter.enter().await.unwrap(), limiter.enter().await.unwrap()];
        let change = |limit| {
            let mut state = limiter.state();
            let was = state.adaptive.limit();
            state.adaptive = AdaptiveLimit::fixed(limit);
            limiter.fit(&mut state, was);
        };
        change(1);
        assert_eq!((free(), owed_and_flying()), (0, (1, 2)));
        change(6);
        assert_eq!((free(), owed_and_flying()), (4, (0, 2)));
        drop(passes);
        assert_eq!((free(), owed_and_flying()), (6, (0, 0)));
    }
}
