use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{stamps::in_order, *};
use crate::{
    history::tests::{changed, committed, created, entries, formed, group},
    ids::Step,
    journal::{Entry, FormedReason, Means, Reached, Record},
    metrics::Row,
};

/// A year later than any other test's records.
const BEGAN: i64 = 1_800_000_000;

pub(in crate::history) fn at(second: f64) -> Timestamp {
    Timestamp::from_nanosecond((i128::from(BEGAN) * 1000 + (second * 1e3).round() as i128) * 1_000_000).unwrap()
}

/// A run with these records at these seconds.
pub(in crate::history) fn state(records: Vec<(f64, Record)>) -> RunState {
    let entry = |(second, record): (f64, Record)| {
        let mut entry = entries(vec![record]).remove(0);
        entry.at = at(second);
        entry
    };
    let mut entries = records.into_iter().map(entry);
    let first: Entry = entries.next().unwrap();
    let Record::Created { run_id, .. } = &first.record else { panic!("it is the first record") };
    let mut state = RunState::begin(&run_id.clone(), first).unwrap();
    for (number, entry) in (1..).zip(entries) {
        state.apply(number, entry).unwrap();
    }
    state
}

/// A commit with these costs; `lived_s` 0: not recorded.
pub(in crate::history) fn saved(step: u64, generation: u64, lived_s: f64, durable_s: f64, stall_s: f64) -> Record {
    let mut record = committed(step, generation);
    if let Record::Committed(committed) = &mut record {
        (committed.cost.lived_s, committed.cost.durable_s, committed.cost.stall_s) = (lived_s, durable_s, stall_s);
    }
    record
}

pub(in crate::history) fn stopped(step: u64, generation: u64, committed: u64) -> Record {
    let (step, generation, committed) = (Step(step), Generation(generation), Step(committed));
    let (lost_steps, verdict) = (step.get() - committed.get(), "x".to_owned());
    Record::Interrupted { generation, step, committed: Some(committed), lost_steps, verdict, drain: None, cap: None }
}

pub(in crate::history) fn completed(step: u64, generation: u64) -> Record {
    Record::Completed { generation: Generation(generation), step: Step(step), loss: Some(1.0), early: None }
}

fn account(records: Vec<(f64, Record)>) -> Account {
    Account::of(&state(records), None, at(1e7))
}

/// Names and lengths of all stretches.
fn stretches(account: &Account) -> Vec<(Activity, f64)> {
    let rounded = |stretch: &Stretch| (stretch.activity, (stretch.seconds() * 1e3).round() / 1e3);
    account.stretches.iter().map(rounded).collect()
}

/// Every second has one name: the stretches follow each other, and the parts are their sums.
fn adds_up(account: &Account) {
    let mut now = 0.0;
    for stretch in &account.stretches {
        assert_eq!(stretch.begin_s.to_bits(), f64::to_bits(now), "{stretch:?}");
        assert!(stretch.end_s > stretch.begin_s && stretch.end_s.is_finite(), "{stretch:?}");
        now = stretch.end_s;
    }
    assert_eq!(account.whole_s.to_bits(), f64::to_bits(now));
    let (parts, machines) = account
        .parts
        .iter()
        .fold((0.0, 0.0), |(seconds, machines), part| (seconds + part.seconds, machines + part.machine_seconds));
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.abs().max(1.0) * (account.stretches.len() as f64 + 1.0);
    assert!(near(parts, account.whole_s), "{parts} and {}", account.whole_s);
    let alive: f64 = account.stretches.iter().map(|s| s.seconds() * s.machines as f64).sum();
    assert!(near(machines, alive), "{machines} and {alive}");
    let mut names: Vec<Activity> = account.parts.iter().map(|part| part.activity).collect();
    names.dedup();
    assert_eq!(names.len(), account.parts.len());
    for share in [account.goodput, account.goodput_of_machines].into_iter().flatten() {
        assert!((0.0..=1.0 + 1e-9).contains(&share), "{share}");
    }
}

/// A second a step; the generation starts for ten seconds; a save stalls for half a second and is durable after two.
pub(in crate::history) fn story() -> Vec<(f64, Record)> {
    vec![
        (0.0, created()),
        (60.0, formed(1, None, &[("train.steps", "400")])),
        // Order after 10 s of start and 100 s of steps.
        (172.0, saved(100, 1, 112.0, 2.0, 0.5)),
        (272.5, saved(200, 1, 212.5, 2.0, 0.5)),
        // 30 steps later it stops, with a loss.
        (310.0, stopped(230, 1, 200)),
        (400.0, formed(3, Some((200, 1)), &[])),
        (512.0, saved(300, 3, 112.0, 2.0, 0.5)),
        // It vanishes.
        (600.0, formed(4, Some((300, 3)), &[])),
        (712.0, saved(400, 4, 112.0, 2.0, 0.5)),
        (713.0, completed(400, 4)),
    ]
}

#[test]
fn every_second_has_the_name_of_what_the_run_did() {
    use Activity::{Away, Ending, Productive, Repeated, Stalled, Starting, Unrecorded, Waiting};
    let account = account(story());
    adds_up(&account);
    assert_eq!(
        stretches(&account),
        [
            (Waiting, 60.0),
            (Starting, 10.0),
            (Productive, 100.0),
            (Stalled, 0.5),
            (Productive, 100.0),
            (Stalled, 0.5),
            (Repeated, 30.0),
            (Ending, 9.0),
            (Away, 90.0),
            (Starting, 10.0),
            (Productive, 100.0),
            (Stalled, 0.5),
            (Repeated, 1.5),
            (Unrecorded, 88.0),
            (Starting, 10.0),
            (Productive, 100.0),
            (Stalled, 0.5),
            (Ending, 2.5),
        ]
    );
    assert_eq!((account.useful_steps, account.lost_steps, account.unknown_losses), (400, 30, 1));
    assert_eq!(account.notes, [""; 0]);
    let interrupted: Vec<bool> = account.stretches.iter().map(|stretch| stretch.interrupted).collect();
    let because: Vec<usize> = (0..interrupted.len()).filter(|index| interrupted[*index]).collect();
    // Lost steps and the exit of the first life, the start of the second, its loss, and the start of the third.
    assert_eq!(because, [6, 7, 9, 12, 14]);
    assert_eq!(account.goodput.map(|share| (share * 713.0).round()), Some(400.0));
    let alive = 713.0 - 60.0 - 90.0 - 88.0;
    assert!((account.alive_s() - alive).abs() < 1e-6 && (account.machine_s() - alive).abs() < 1e-6);
}

#[test]
fn figures_tell_how_long_a_start_took_and_what_a_machine_did_before_it_vanished() {
    let mut records = story();
    records.truncate(3);
    records.push((600.0, formed(3, Some((100, 1)), &[])));
    let mut figures = Series::default();
    // A tenth of a second a step up to the save: the start took 100 s. Twenty steps are known of after it.
    for step in 1..=120_u64 {
        let (second, step_s) = if step <= 100 { (0.1 * step as f64 + 160.0, 0.1) } else { (70.0 + step as f64, 1.0) };
        let figures_of = [("loss".to_owned(), 1.0), ("step_s".to_owned(), step_s)].into();
        let at_ms = at(second).as_millisecond();
        figures.push(&Row { step: Step(step), generation: Generation(1), at_ms, figures: figures_of });
    }
    let account = Account::of(&state(records), Some(&figures), at(1e7));
    adds_up(&account);
    use Activity::{Productive, Repeated, Stalled, Starting, Unrecorded, Waiting};
    assert_eq!(
        stretches(&account),
        [
            (Waiting, 60.0),
            (Starting, 100.0),
            (Productive, 10.0),
            (Stalled, 0.5),
            // Step 120 was reported at second 190, the save at 172.
            (Repeated, 19.5),
            (Unrecorded, 410.0),
        ]
    );
    assert_eq!((account.useful_steps, account.lost_steps), (100, 20));
}

#[test]
fn a_resume_from_an_earlier_checkpoint_makes_steps_void_and_a_run_that_gets_more_steps_was_complete() {
    let mut records = story();
    records.push((1000.0, formed(5, Some((400, 4)), &[("train.steps", "500")])));
    records.push((1112.0, saved(500, 5, 112.0, 2.0, 0.5)));
    let again = account(records.clone());
    adds_up(&again);
    assert_eq!((again.part(Activity::Complete).seconds, again.useful_steps), (287.0, 500));
    // The steps since the last save are in its last 1.5 s.
    assert!((again.goodput.unwrap() * (again.whole_s - 287.0) - 501.5).abs() < 1e-6);
    records.push((1200.0, formed(6, Some((200, 1)), &[])));
    let back = account(records);
    adds_up(&back);
    assert_eq!((back.useful_steps, back.lost_steps), (200, 30 + 100 + 100 + 100));
    assert_eq!(back.part(Activity::Productive).seconds.round(), 200.0);
}

#[test]
fn a_group_that_goes_on_is_alive_between_two_generations() {
    let lost = |reason| {
        let next = group(2, Some(1), &[("b", 1)]);
        let mut next = changed(next, &[("a", "it does not answer")], &[]);
        if let Record::Formed { reason: why, resume, .. } = &mut next {
            *why = reason;
            *resume = Some(crate::journal::ResumePoint { step: Step(200), generation: Generation(1) });
        }
        let records = vec![
            (0.0, created()),
            (0.0, group(1, None, &[("a", 1), ("b", 1)])),
            (112.0, saved(100, 1, 112.0, 2.0, 0.5)),
            (212.5, saved(200, 1, 212.5, 2.0, 0.5)),
            (250.0, next),
        ];
        let account = account(records);
        adds_up(&account);
        let last = account.stretches.last().unwrap().clone();
        (last.activity, last.seconds(), last.machines, account.part(Activity::Repeated).seconds)
    };
    // The save's two seconds, and the time until the others formed anew.
    assert_eq!(lost(FormedReason::NodeLost), (Activity::Repeated, 37.5, 1, 39.0));
    assert_eq!(lost(FormedReason::NodeLeft), (Activity::Ending, 37.5, 1, 0.0));
}

#[test]
fn a_run_at_its_cap_was_not_interrupted() {
    let mut records = story();
    records.truncate(4);
    let mut end = stopped(200, 1, 200);
    if let Record::Interrupted { cap, .. } = &mut end {
        *cap = Some(Reached { cap: crate::journal::Cap::MaxHours, limit: 1.0, used: 1.0 });
    }
    records.push((280.0, end));
    records.push((400.0, formed(3, Some((200, 1)), &[])));
    let account = account(records);
    adds_up(&account);
    assert!(account.stretches.iter().all(|stretch| !stretch.interrupted));
    assert_eq!(account.part(Activity::Away).seconds, 120.0);
}

/// A machine that comes up in 1970 and learns the time a minute later, and one whose clock is days ahead.
#[test]
fn a_wrong_clock_makes_no_century() {
    let right = account(story());
    let mut late = story();
    late[1].0 = -(BEGAN as f64);
    let found = account(late);
    adds_up(&found);
    // Its saves say when the generation began.
    assert_eq!((stretches(&found), found.notes.len()), (stretches(&right), 1));
    assert!(found.notes[0].contains("generation 1 was set while it ran"), "{:?}", found.notes);
    let mut created = story();
    created[0].0 = -(BEGAN as f64);
    let found = account(created);
    adds_up(&found);
    assert_eq!(found.whole_s, 653.0);
    assert!(found.notes[0].contains("when the run was created"), "{:?}", found.notes);
    // The second machine is ten days ahead, the third is right.
    let mut ahead = story();
    (ahead[5].0, ahead[6].0) = (400.0 + 864_000.0, 512.0 + 864_000.0);
    let found = account(ahead);
    adds_up(&found);
    assert_eq!(found.whole_s, right.whole_s);
    assert_eq!((found.part(Activity::Away).seconds, found.part(Activity::Unrecorded).seconds), (0.0, 178.0));
    assert!(found.notes[0].contains("generation 3 disagrees"), "{:?}", found.notes);
    // Without a monotonic clock the last record counts as far as its steps account for it.
    let mut forward = story();
    for (_, record) in &mut forward {
        if let Record::Committed(committed) = record {
            committed.cost.lived_s = 0.0;
        }
    }
    let plain = account(forward.clone());
    adds_up(&plain);
    assert_eq!(plain.whole_s, right.whole_s);
    forward[9].0 += 1e9;
    let found = account(forward);
    adds_up(&found);
    assert!(found.whole_s <= right.whole_s + 3600.0, "{}", found.whole_s);
    // All of it is in 1970.
    let early: Vec<(f64, Record)> = story().into_iter().map(|(at, record)| (at - BEGAN as f64, record)).collect();
    assert_eq!(stretches(&account(early)), stretches(&right));
}

#[test]
fn the_largest_set_in_order_is_kept() {
    let kept = |stamps: &[f64]| in_order(&stamps.iter().map(|at| at.is_finite().then_some(*at)).collect::<Vec<_>>());
    assert_eq!(kept(&[1.0, 2.0, 2.0, 3.0]), [true; 4]);
    assert_eq!(kept(&[1.0, 9.0, 2.0, f64::NAN, 3.0]), [true, false, true, false, true]);
    assert_eq!(kept(&[5.0, 6.0, 1.0, 7.0]), [true, true, false, true]);
    assert_eq!(kept(&[]), [false; 0]);
}

/// A life of a machine, as it really was: wait, start, steps and saves, and its end.
#[derive(Clone, Debug)]
struct Truth {
    wait: u32,
    start: u32,
    /// Steps between two saves.
    saves: Vec<u32>,
    /// Steps after the last save.
    more: u32,
    end: Ends,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    /// It saves its last step and says so.
    Drained,
    /// It says that steps are lost.
    Lost,
    /// It says nothing.
    Killed,
    /// One of its workers dies: the same machine goes on.
    Worker,
}

fn truth() -> impl Strategy<Value = Vec<Truth>> {
    let ends = prop_oneof![Just(Ends::Drained), Just(Ends::Lost), Just(Ends::Killed), Just(Ends::Worker)];
    let life = (0..5000_u32, 1..300_u32, proptest::collection::vec(1..200_u32, 2..6), 1..50_u32, ends);
    let life = life.prop_map(|(wait, start, saves, more, end)| Truth { wait, start, saves, more, end });
    proptest::collection::vec(life, 1..8)
}

/// A second a step; stall, time until a save is durable, exit.
const STEP_S: f64 = 1.0;
const STALL_S: f64 = 0.25;
const DURABLE_S: f64 = 0.75;
const EXIT_S: f64 = 3.0;

/// The journal of these lives, and what they did: seconds by name.
fn lived(lives: &[Truth]) -> (Vec<(f64, Record)>, BTreeMap<Activity, f64>) {
    let (mut records, mut now) = (vec![(0.0, created())], 0.0);
    let mut spent: BTreeMap<Activity, f64> = BTreeMap::new();
    let mut point: Option<(u64, u64)> = None;
    for (index, life) in lives.iter().enumerate() {
        let mut add = |activity, seconds: f64| *spent.entry(activity).or_default() += seconds;
        let generation = index as u64 + 1;
        let same = index > 0 && lives[index - 1].end == Ends::Worker;
        let wait = if same { 0.0 } else { f64::from(life.wait) };
        let name = match index.checked_sub(1).map(|before| lives[before].end) {
            None => Activity::Waiting,
            Some(Ends::Drained | Ends::Lost) => Activity::Away,
            Some(Ends::Killed | Ends::Worker) => Activity::Unrecorded,
        };
        add(name, wait);
        now += wait;
        let mut next = formed(generation, point, &[]);
        if let Record::Formed { reason, .. } = &mut next {
            *reason = if same { FormedReason::WorkerDied } else { FormedReason::Started };
        }
        records.push((now, next));
        let began = now;
        add(Activity::Starting, f64::from(life.start));
        now += f64::from(life.start);
        let mut step = point.map_or(0, |(step, _)| step);
        for (number, steps) in life.saves.iter().enumerate() {
            step += u64::from(*steps);
            now += f64::from(*steps) * STEP_S;
            add(Activity::Productive, f64::from(*steps) * STEP_S);
            let lived_s = now + DURABLE_S - began;
            records.push((now + DURABLE_S, saved(step, generation, lived_s, DURABLE_S, STALL_S)));
            let last = number + 1 == life.saves.len();
            if !last || life.end != Ends::Drained {
                now += STALL_S;
                add(Activity::Stalled, STALL_S);
            }
        }
        point = Some((step, generation));
        match life.end {
            Ends::Drained => {
                add(Activity::Stalled, STALL_S);
                add(Activity::Ending, DURABLE_S + EXIT_S - STALL_S);
                now += DURABLE_S + EXIT_S;
                records.push((now, stopped(step, generation, step)));
            }
            Ends::Lost => {
                add(Activity::Repeated, f64::from(life.more) * STEP_S);
                add(Activity::Ending, EXIT_S);
                now += f64::from(life.more) * STEP_S + EXIT_S;
                records.push((now, stopped(step + u64::from(life.more), generation, step)));
            }
            // The save's record is the last sign of it.
            Ends::Killed if index + 1 < lives.len() => {
                add(Activity::Repeated, DURABLE_S - STALL_S);
                add(Activity::Unrecorded, f64::from(life.more));
                now += DURABLE_S - STALL_S + f64::from(life.more);
            }
            Ends::Worker if index + 1 < lives.len() => {
                add(Activity::Repeated, f64::from(life.more));
                now += f64::from(life.more);
            }
            // It may be at work.
            Ends::Killed | Ends::Worker => {
                add(Activity::Productive, DURABLE_S - STALL_S);
                now += DURABLE_S - STALL_S;
            }
        }
    }
    spent.retain(|_, seconds| *seconds > 0.0);
    (records, spent)
}

/// Any record at any time, the journal's rules kept.
fn anything() -> impl Strategy<Value = Vec<(f64, Record)>> {
    let stamp = prop_oneof![4 => -1e4..1e6_f64, 1 => Just(-(BEGAN as f64)), 1 => Just(3e9), 1 => Just(-1.5e9)];
    let cost = prop_oneof![Just(0.0), 0.0..1e4_f64, Just(f64::NAN), Just(f64::INFINITY), Just(1e300), Just(-5.0)];
    let record = (0..8_u8, stamp, cost.clone(), cost.clone(), cost, any::<u16>());
    proptest::collection::vec(record, 0..60).prop_map(|drawn| {
        let mut records = vec![(drawn.first().map_or(0.0, |first| first.1), created())];
        let (mut generation, mut points, mut open) = (0_u64, Vec::<(u64, u64)>::new(), false);
        for (kind, second, lived_s, durable_s, stall_s, pick) in drawn {
            let step = u64::from(pick) % 500;
            let record = match kind {
                0 | 1 => {
                    let resume = points.get(usize::from(pick) % (points.len() + 1)).copied();
                    let mut next = formed(generation + 1, resume, &[]);
                    if let Record::Formed { reason, .. } = &mut next {
                        let reasons = [FormedReason::Started, FormedReason::WorkerDied];
                        *reason = reasons[usize::from(pick) % 2];
                    }
                    (generation, open) = (generation + 1, true);
                    next
                }
                _ if !open => continue,
                2..=4 if !points.contains(&(step, generation)) => {
                    points.push((step, generation));
                    saved(step, generation, lived_s, durable_s, stall_s)
                }
                5 => stopped(step.max(1), generation, step / 2),
                6 => completed(step, generation),
                7 => Record::Notice {
                    generation: Generation(generation),
                    source: "x".into(),
                    deadline_s: Some(lived_s),
                    means: Means::Interruption,
                },
                _ => continue,
            };
            records.push((second, record));
        }
        records
    })
}

proptest! {
    /// The account is what the run did.
    #[test]
    fn the_account_is_what_the_run_did(lives in truth()) {
        let (records, spent) = lived(&lives);
        let account = account(records);
        adds_up(&account);
        let found: BTreeMap<Activity, f64> = account.parts.iter().map(|part| (part.activity, part.seconds)).collect();
        prop_assert_eq!(found.keys().collect::<Vec<_>>(), spent.keys().collect::<Vec<_>>());
        for (activity, seconds) in &spent {
            prop_assert!((found[activity] - seconds).abs() < 0.01, "{activity:?}: {} and {seconds}", found[activity]);
        }
        prop_assert!(account.notes.is_empty(), "{:?}", account.notes);
        let useful: u64 = lives.iter().flat_map(|life| &life.saves).map(|steps| u64::from(*steps)).sum();
        prop_assert_eq!(account.useful_steps, useful);
    }

    /// Whatever clocks and figures say, the parts are the whole.
    #[test]
    fn whatever_a_journal_says_its_seconds_have_one_name_each(records in anything()) {
        adds_up(&account(records));
    }
}
