//! The meaning of findings: pure functions, from an observation to a line with a verdict and the remedy.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    cloud::{
        gpus::{Choice, Found},
        quota::{Family, Quota},
    },
    error::{Error, Kind},
    ids::SlotCount,
    notice::window::Surroundings,
    report::human,
    storage::AbortRule,
};

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works, but could cause harm.
    Warn,
    /// A run would fail, or lose work that it should not.
    Fail,
    /// There is nothing to check here, or no way to.
    Skipped,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The subject of the check.
    pub check: &'static str,
    /// The result.
    pub verdict: Verdict,
    /// The finding.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub todo: Option<String>,
    /// For a failure: its kind, which says who must act.
    #[serde(skip)]
    pub kind: Option<Kind>,
}

impl Line {
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), todo: None, kind: None }
    }

    pub(super) fn skipped(check: &'static str, found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Skipped, ..Self::ok(check, found) }
    }

    pub(super) fn warn(check: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, todo: Some(todo.into()), ..Self::ok(check, found) }
    }

    pub(super) fn fail(check: &'static str, kind: Kind, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, kind: Some(kind), ..Self::warn(check, found, todo) }
    }

    /// An error is a failure; the remedy is its hint, or else that of its kind.
    pub(super) fn error(check: &'static str, error: &Error) -> Self {
        let todo = error.hint().unwrap_or(match error.kind() {
            Kind::Usage | Kind::Config => "correct the named setting, then run doctor again",
            Kind::Permission => "grant the named permission to this process's role, key or user",
            Kind::Unavailable => "check the network, proxies and endpoints, then run doctor again",
            Kind::Data => "restore the named data from a copy, or create it again",
            Kind::Bug => "report it, with this line",
            Kind::Fenced | Kind::Interrupted | Kind::InterruptedWithLoss | Kind::Capped | Kind::Fruitless => {
                "look again"
            }
        });
        Self::fail(check, error.kind(), error.to_string(), todo)
    }
}

/// The exit code: 0, or that of the worst failure. Failures that must be fixed by hand before anything can work come
/// first; those that may pass by themselves come last.
pub fn exit_code(lines: &[Line]) -> u8 {
    let failed = lines.iter().filter(|line| line.verdict == Verdict::Fail).filter_map(|line| line.kind);
    let rank = |kind: &Kind| match kind {
        Kind::Config | Kind::Usage | Kind::Data | Kind::Bug | Kind::Fenced | Kind::Capped | Kind::Fruitless => 2,
        Kind::Permission => 1,
        Kind::Unavailable | Kind::Interrupted | Kind::InterruptedWithLoss => 0,
    };
    failed.max_by_key(rank).map_or(0, |kind| match rank(&kind) {
        2 => Kind::Config.exit_code(),
        1 => Kind::Permission.exit_code(),
        _ => Kind::Unavailable.exit_code(),
    })
}

/// The machine's GPUs, those that the driver shows, and those that LibTorch can use.
pub(super) fn devices(found: &Found) -> Line {
    const CHECK: &str = "devices";
    let gpus = |count: usize| human::plural(count as u64, "GPU");
    let usable = usize::try_from(found.usable).unwrap_or(usize::MAX);
    match found.choose() {
        Choice::Gpu if usable >= found.seen.device_files => Line::ok(CHECK, format!("{} for LibTorch", gpus(usable))),
        Choice::Gpu => {
            let found = format!("{}, of which LibTorch can use {usable}", gpus(found.seen.device_files));
            Line::fail(CHECK, Kind::Config, found, "see nvidia-smi; CUDA_VISIBLE_DEVICES may hide some")
        }
        Choice::Cpu(None) => Line::ok(CHECK, "no GPU: workers compute on the CPU"),
        Choice::Cpu(Some(note)) => Line::warn(
            CHECK,
            note,
            "to use them: build with CUDA (scripts/setup --cuda), install the driver, and remove settings that choose \
             the CPU",
        ),
        Choice::Refused { what, hint } => Line::fail(CHECK, Kind::Config, what, hint),
    }
}

/// Bytes that the host needs: the whole state in each snapshot slot, and on a CPU the workers' own state and work
/// space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Need {
    /// Bytes of one snapshot.
    pub state: u64,
    /// Bytes of all workers on this host's memory.
    pub workers: u64,
    /// Bytes of the weights that adapters are trained beside, which the agent keeps for its workers.
    pub base: u64,
}

/// Bytes of work space that a process with LibTorch takes on a CPU.
const WORK_SPACE: u64 = 512 << 20;

/// The memory for a model of `parameters` parameters: moments and fp32 weights take 12 bytes per parameter, with bf16
/// the copies of the weights 2 more; gradients are as large as their weights.
pub(super) fn need(parameters: u64, bf16: bool, workers: u32, on_cpu: bool) -> Need {
    let weights = if bf16 { 2 } else { 4 };
    let state = parameters.saturating_mul(if bf16 { 14 } else { 12 });
    let each = state.saturating_add(parameters.saturating_mul(weights)).saturating_add(WORK_SPACE);
    Need { state, workers: if on_cpu { each.saturating_mul(workers.into()) } else { 0 }, base: 0 }
}

/// The memory for `adapters` parameters that are trained in fp32 beside a frozen base of `parameters`. The base's files
/// are assumed to be in the type used for computing.
pub(super) fn need_of_adapters(parameters: u64, adapters: u64, bf16: bool, workers: u32, on_cpu: bool) -> Need {
    let base = parameters.saturating_mul(if bf16 { 2 } else { 4 });
    let trained = need(adapters, false, 1, true);
    let each = trained.workers.saturating_add(base);
    Need { state: trained.state, workers: if on_cpu { each.saturating_mul(workers.into()) } else { 0 }, base }
}

/// Whether `available` bytes of memory suffice.
pub(super) fn memory(need: Need, count: SlotCount, available: u64) -> Line {
    const CHECK: &str = "memory";
    let slots = need.state.saturating_mul(count.get().into());
    let all = slots.saturating_add(need.workers).saturating_add(need.base);
    let workers = match need.workers {
        0 => String::new(),
        bytes => format!(", {} for workers", human::bytes(bytes)),
    };
    let base = match need.base {
        0 => String::new(),
        bytes => format!(", {} for the files of model.init_from", human::bytes(bytes)),
    };
    let found = format!(
        "{} available; a run takes about {}: {} for {}{workers}{base}",
        human::bytes(available),
        human::bytes(all),
        human::bytes(slots),
        if count == SlotCount::ONE { "one snapshot slot" } else { "two snapshot slots" },
    );
    if all > available {
        let todo = "use a machine with more memory, fewer workers, or a smaller model; in a container, raise its limit";
        let todo = if count != SlotCount::ONE && all - need.state <= available {
            format!("--set checkpoint.slots=1 halves what the slots take; or {todo}")
        } else {
            todo.to_owned()
        };
        return Line::fail(CHECK, Kind::Config, found, todo);
    }
    if all > available / 10 * 9 {
        return Line::warn(CHECK, found, "little is left for the page cache and for everything else");
    }
    Line::ok(CHECK, found)
}

/// Whether a dataset can be trained on: its training sequences, its validation sequences, and how often these are
/// measured.
pub(super) fn dataset(uri: &str, train: u64, validation: u64, sequence_length: u32, validation_every: u64) -> Line {
    const CHECK: &str = "dataset";
    let found = format!("{train} sequences of {sequence_length} tokens and {validation} for validation in {uri}");
    if train == 0 {
        return Line::fail(CHECK, Kind::Config, found, "lower data.sequence_length, or prepare more text");
    }
    if validation == 0 && validation_every > 0 {
        let todo = "prepare it with --validation-ratio, or set data.validation_every = 0";
        return Line::warn(CHECK, format!("{found}: the validation loss will never be measured"), todo);
    }
    Line::ok(CHECK, found)
}

/// What the bucket does with unfinished uploads.
pub(super) fn lifecycle(rule: AbortRule) -> Line {
    const CHECK: &str = "lifecycle rule";
    const TODO: &str = "add a rule with AbortIncompleteMultipartUpload after 2 days: the parts of an interrupted \
                        upload are billed until it is aborted, and a run that is never resumed aborts none";
    match rule {
        AbortRule::NotNeeded => Line::skipped(CHECK, "not on S3"),
        AbortRule::Missing => Line::warn(CHECK, "no rule aborts unfinished uploads below this prefix", TODO),
        AbortRule::After { days: 0 } => {
            Line::warn(CHECK, "unfinished uploads are aborted at once", "give large uploads a day at least")
        }
        AbortRule::After { days } => {
            Line::ok(CHECK, format!("unfinished uploads are aborted after {}", human::plural(days.into(), "day")))
        }
    }
}

/// The difference between the store's clock and this machine's. `before` and `after`: around the request in which the
/// store recorded its time, which it gives in whole seconds.
pub(super) fn clock(before: Timestamp, store: Timestamp, after: Timestamp) -> Line {
    const CHECK: &str = "clock";
    let early = before.duration_since(store).as_secs_f64() - 1.0;
    let late = store.duration_since(after).as_secs_f64();
    let skew = early.max(late).max(0.0);
    let found = match skew {
        skew if skew < 1.0 => "agrees with the store's".to_owned(),
        skew if early > late => format!("{} ahead of the store's", human::seconds(skew)),
        skew => format!("{} behind the store's", human::seconds(skew)),
    };
    match skew {
        // S3 refuses requests signed with a clock that is a quarter of an hour off (RequestTimeTooSkewed).
        skew if skew > 600.0 => {
            Line::fail(CHECK, Kind::Config, found, "set this machine's clock: chronyd or systemd-timesyncd")
        }
        skew if skew > 30.0 => Line::warn(CHECK, found, "let chronyd or systemd-timesyncd keep this machine's clock"),
        _ => Line::ok(CHECK, found),
    }
}

/// Whether a save fits between the request to stop and the kill. `durable`: the longest of the run's newest saves.
pub(super) fn stop_window(window: Option<Duration>, here: Surroundings, durable: Option<f64>) -> Line {
    const CHECK: &str = "stop time-out";
    let raise = match here {
        Surroundings { kubernetes: true, .. } => "raise terminationGracePeriodSeconds",
        Surroundings { slurm: true, .. } => "submit with --signal=B:USR1@120, or have KillWait raised",
        Surroundings { container: true, .. } => "start the container with --stop-timeout 110",
        Surroundings { systemd: true, .. } => "set TimeoutStopSec=110 in the unit",
        Surroundings { .. } => "raise the time-out of what starts this process",
    };
    let todo = format!("{raise}, and say so with TRAINER_STOP_WINDOW=110s");
    match (window, durable) {
        (None, None) => Line::ok(CHECK, "no stop time-out is known"),
        (None, Some(durable)) => {
            Line::ok(CHECK, format!("a save takes {}; no stop time-out is known", human::seconds(durable)))
        }
        (Some(window), None) => {
            let found = format!(
                "{} from the request to stop to the kill; the time of a save is not known yet (--run-id)",
                human::seconds(window.as_secs_f64())
            );
            if window < Duration::from_secs(20) { Line::warn(CHECK, found, todo) } else { Line::ok(CHECK, found) }
        }
        (Some(window), Some(durable)) => {
            let window = window.as_secs_f64();
            let found = format!(
                "{} from the request to stop to the kill; a save takes up to {}",
                human::seconds(window),
                human::seconds(durable)
            );
            if durable > window * 0.8 { Line::warn(CHECK, found, todo) } else { Line::ok(CHECK, found) }
        }
    }
}

/// Spot machines wanted at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct SpotRequest<'a> {
    /// Their type.
    pub instance_type: &'a str,
    /// Their region.
    pub region: &'a str,
    /// Their number.
    pub count: u32,
    /// The vCPUs of one of them; `None`: not known.
    pub vcpus: Option<u32>,
}

/// Whether the account may have these machines.
pub(super) fn quota(machines: SpotRequest<'_>, family: Family, quota: Quota) -> Line {
    const CHECK: &str = "spot quota";
    let (SpotRequest { instance_type, region, count, vcpus }, Family { name, spot }) = (machines, family);
    let from = if quota.is_default { " (AWS's default: none was applied to this account)" } else { "" };
    let have = format!("{} vCPUs of {name} spot machines in {region}{from}", quota.vcpus);
    let Some(vcpus) = vcpus.map(u64::from) else {
        let todo = format!("compare the quota with: aws ec2 describe-instance-types --instance-types {instance_type}");
        return Line::warn(CHECK, format!("{have}; how many vCPUs {instance_type} has is not known here"), todo);
    };
    let all = vcpus * u64::from(count);
    let takes = if count == 1 { "takes" } else { "take" };
    let found = format!("{have}; {} {takes} {all}", human_count(count, instance_type));
    // A replacement may be started before the replaced machine has gone.
    let enough = all + vcpus;
    let todo = format!(
        "EC2 will answer \"Max spot instance count exceeded\": request more with aws service-quotas \
        request-service-quota-increase \
         --region {region} --service-code ec2 --quota-code {spot} --desired-value {enough}"
    );
    match quota.vcpus {
        quota if quota < all as f64 => Line::fail(CHECK, Kind::Config, found, todo),
        quota if quota < enough as f64 => Line::warn(
            CHECK,
            format!("{found}: a replacement that starts before another one has gone is refused"),
            todo,
        ),
        _ => Line::ok(CHECK, found),
    }
}

fn human_count(count: u32, instance_type: &str) -> String {
    if count == 1 { instance_type.to_owned() } else { format!("{count} x {instance_type}") }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{FAIL, OK, SKIPPED, WARN, is},
        *,
    };
    use crate::{cloud::hardware::Gpus, config::Device};

    #[test]
    fn the_worst_failure_is_the_exit_code() {
        let fail = |kind| Line::fail("x", kind, "", "");
        for (lines, code) in [
            (vec![], 0),
            (vec![Line::ok("x", ""), Line::warn("x", "", ""), Line::skipped("x", "")], 0),
            (vec![fail(Kind::Unavailable)], 69),
            (vec![fail(Kind::Permission), fail(Kind::Unavailable)], 77),
            (vec![fail(Kind::Unavailable), fail(Kind::Config), fail(Kind::Permission)], 78),
            (vec![fail(Kind::Data)], 78),
        ] {
            assert_eq!(exit_code(&lines), code, "{lines:?}");
        }
    }

    #[test]
    fn unusable_devices_are_reported() {
        let seen = |on_the_bus, driver, device_files| Gpus { on_the_bus, driver, device_files };
        let found = |seen: Gpus, cuda, usable| Found {
            wanted: Device::Auto,
            cuda,
            seen,
            driver: None,
            unified_memory: true,
            usable,
            gpu: None,
            visible: None,
            given: None,
        };
        for (seen, cuda, usable, expected) in [
            (seen(0, false, 0), false, 0, OK),
            (seen(0, false, 0), true, 0, OK),
            (seen(8, true, 8), true, 8, OK),
            (seen(8, true, 8), true, 4, FAIL),
            (seen(8, true, 8), false, 0, FAIL),
            (seen(8, false, 0), false, 0, WARN),
            (seen(8, false, 0), true, 0, FAIL),
            (seen(8, true, 0), true, 0, FAIL),
            // In a container the bus may be out of sight.
            (seen(0, true, 2), true, 2, OK),
        ] {
            assert_eq!(is(&devices(&found(seen, cuda, usable))), expected, "{seen:?} {cuda} {usable}");
        }
    }

    #[test]
    fn the_slots_and_the_workers_must_fit() {
        let gib = 1_u64 << 30;
        assert_eq!(need(1_000_000_000, true, 8, false), Need { state: 14_000_000_000, workers: 0, base: 0 });
        let workers = 2 * (16_000_000 + WORK_SPACE);
        assert_eq!(need(1_000_000, false, 2, true), Need { state: 12_000_000, workers, base: 0 });
        let adapters = need_of_adapters(8_000_000_000, 1_000_000, true, 8, false);
        assert_eq!(adapters, Need { state: 12_000_000, workers: 0, base: 16_000_000_000 });
        let workers = 2 * (4_000_000_000 + 16_000_000 + WORK_SPACE);
        assert_eq!(need_of_adapters(1_000_000_000, 1_000_000, false, 2, true).workers, workers);
        assert_eq!(need(u64::MAX, true, 2, true).state, u64::MAX);
        let need = Need { state: 10 * gib, workers: 4 * gib, base: gib };
        for (available, expected) in [(20 * gib, FAIL), (26 * gib, WARN), (28 * gib, OK), (0, FAIL)] {
            assert_eq!(is(&memory(need, SlotCount::TWO, available)), expected, "{available}");
        }
        for (available, expected) in [(14 * gib, FAIL), (16 * gib, WARN), (20 * gib, OK)] {
            assert_eq!(is(&memory(need, SlotCount::ONE, available)), expected, "{available}");
        }
        let todo = |count, available| format!("{:?}", memory(need, count, available)).contains("checkpoint.slots=1");
        assert!(todo(SlotCount::TWO, 20 * gib), "one slot fits");
        assert!(!todo(SlotCount::TWO, 14 * gib) && !todo(SlotCount::ONE, 14 * gib), "not even that");
    }

    #[test]
    fn a_bucket_should_abort_unfinished_uploads() {
        assert_eq!(is(&lifecycle(AbortRule::After { days: 2 })), OK);
        assert_eq!(is(&lifecycle(AbortRule::After { days: 0 })), WARN);
        assert_eq!(is(&lifecycle(AbortRule::Missing)), WARN);
        assert_eq!(is(&lifecycle(AbortRule::NotNeeded)), SKIPPED);
    }

    #[test]
    fn clocks_are_compared_over_a_request() {
        let at = |seconds: i64| Timestamp::from_second(1_000_000 + seconds).unwrap();
        for (store, expected) in
            [(10, OK), (9, OK), (12, OK), (41, OK), (50, WARN), (-25, WARN), (700, FAIL), (-700, FAIL)]
        {
            assert_eq!(is(&clock(at(10), at(store), at(12))), expected, "{store}");
        }
        assert!(clock(at(10), at(-50), at(12)).found.contains("ahead"));
        assert!(clock(at(10), at(100), at(12)).found.contains("behind"));
    }

    #[test]
    fn a_dataset_must_hold_a_sequence() {
        for (train, validation, every, expected) in
            [(10, 0, 0, OK), (10, 3, 50, OK), (10, 0, 50, WARN), (0, 3, 50, FAIL), (0, 0, 0, FAIL)]
        {
            assert_eq!(
                is(&dataset("s3://b/d", train, validation, 512, every)),
                expected,
                "{train} {validation} {every}"
            );
        }
    }

    /// Every line that is not OK says what to do, even if its error has no hint.
    #[test]
    fn a_line_of_an_error_without_a_hint_says_what_to_do() {
        for kind in [
            Kind::Usage,
            Kind::Data,
            Kind::Unavailable,
            Kind::Bug,
            Kind::Interrupted,
            Kind::InterruptedWithLoss,
            Kind::Permission,
            Kind::Config,
            Kind::Fenced,
            Kind::Capped,
            Kind::Fruitless,
        ] {
            let line = Line::error("x", &Error::new(kind, "what"));
            assert!(line.todo.is_some_and(|todo| !todo.is_empty()), "{kind:?}");
        }
        let line = Line::error("x", &Error::new(Kind::Config, "what").with_hint("do this"));
        assert_eq!(line.todo.as_deref(), Some("do this"));
    }

    #[test]
    fn a_save_must_fit_into_the_time_to_stop() {
        let pod = Surroundings { kubernetes: true, container: true, ..Surroundings::default() };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        for (window, durable, expected) in [
            (None, None, OK),
            (None, Some(1e6), OK),
            (seconds(10), None, WARN),
            (seconds(30), None, OK),
            (seconds(30), Some(23.0), OK),
            (seconds(30), Some(25.0), WARN),
        ] {
            assert_eq!(is(&stop_window(window, pod, durable)), expected, "{window:?} {durable:?}");
        }
        let advice = |here| stop_window(seconds(1), here, None).todo.unwrap();
        assert!(advice(pod).contains("terminationGracePeriodSeconds"));
        assert!(advice(Surroundings { systemd: true, ..Surroundings::default() }).contains("TimeoutStopSec"));
        assert!(advice(Surroundings { container: true, ..Surroundings::default() }).contains("--stop-timeout"));
    }

    #[test]
    fn a_quota_must_take_the_machine() {
        let family = crate::cloud::quota::family("g5.xlarge").unwrap();
        let machines = |count, vcpus| SpotRequest { instance_type: "g5.xlarge", region: "us-east-1", count, vcpus };
        let have = |vcpus| Quota { vcpus, is_default: false };
        for (has, count, expected) in [
            (0.0, 1, FAIL),
            (3.0, 1, FAIL),
            (4.0, 1, WARN),
            (8.0, 1, OK),
            (1e6, 1, OK),
            (8.0, 3, FAIL),
            (12.0, 3, WARN),
            (16.0, 3, OK),
            (1e6, u32::MAX, FAIL),
        ] {
            let line = quota(machines(count, Some(4)), family, have(has));
            assert_eq!(is(&line), expected, "{has} {count}");
        }
        let todo = quota(machines(3, Some(4)), family, have(0.0)).todo.unwrap();
        for said in ["L-3819A6DF", "--region us-east-1", "--desired-value 16"] {
            assert!(todo.contains(said), "{todo}");
        }
        assert_eq!(is(&quota(machines(1, None), family, have(1e6))), WARN, "nobody knows how many there must be");
        let default = quota(machines(1, Some(4)), family, Quota { vcpus: 0.0, is_default: true });
        assert!(default.found.contains("AWS's default"), "{default:?}");
    }
}
