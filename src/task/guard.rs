//! Calls of a task's code. An error is named by task and call, and a panic is one, too: not a bug of this library.

use std::{
    any::Any,
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

use super::{Fallible, TaskError};

thread_local! {
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in a task's code: a panic is the task's own.
pub fn at_work() -> bool {
    AT_WORK.with(Cell::get)
}

/// Calls a task's code; `doing` is a verb phrase: "make a batch".
pub(super) fn call<T>(task: &str, doing: &'static str, code: impl FnOnce() -> Fallible<T>) -> Result<T, TaskError> {
    AT_WORK.with(|at_work| at_work.set(true));
    // What a panic has left half done is not used again: the worker, or the command, ends.
    let done = catch_unwind(AssertUnwindSafe(code));
    AT_WORK.with(|at_work| at_work.set(false));
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(TaskError::Failed { task: task.to_owned(), doing, source }),
        Err(panic) => Err(TaskError::Panicked { task: task.to_owned(), doing, what: said(&*panic) }),
    }
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it says nothing more").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};

    #[test]
    fn an_error_and_a_panic_of_a_task_are_told_with_the_task_and_the_call() {
        assert!(!at_work());
        assert!(call("shapes", "make a batch", || Ok(at_work())).unwrap());
        let failed = call("shapes", "make a batch", || Err::<(), _>("no such file".into())).unwrap_err();
        assert_eq!(Error::from(failed).to_string(), "task shapes failed to make a batch: no such file");
        for number in [7, 8] {
            let panicked = call::<()>("shapes", "compute its loss", || {
                if number == 7 { panic!("index {number}") } else { panic!("plain") }
            });
            let what = if number == 7 { "index 7" } else { "plain" };
            let error = Error::from(panicked.unwrap_err());
            assert_eq!(error.to_string(), format!("task shapes panicked as it should compute its loss: {what}"));
            assert_eq!(error.kind(), Kind::Bug);
        }
        assert!(!at_work());
    }
}
