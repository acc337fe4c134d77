//! For the unit tests of this room: a line's verdict, and whether it says what to do.

use super::{Line, verdict::Verdict};

pub(super) fn is(line: &Line) -> (Verdict, bool) {
    (line.verdict, line.todo.is_some())
}

pub(super) const OK: (Verdict, bool) = (Verdict::Ok, false);
pub(super) const SKIPPED: (Verdict, bool) = (Verdict::Skipped, false);
pub(super) const WARN: (Verdict, bool) = (Verdict::Warn, true);
pub(super) const FAIL: (Verdict, bool) = (Verdict::Fail, true);
