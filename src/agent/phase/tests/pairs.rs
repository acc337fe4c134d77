//! Two things that go wrong one after the other, in every phase.

use super::*;

const STATES: [fn() -> Rig; 4] = [loading, training, draining, salvage];
/// A name, and how the event comes about.
type Misfortune = (&'static str, fn() -> Event);
const EVENTS: [Misfortune; 4] =
    [("notice", || spot(25)), ("exit", exited), ("failed save", || save_failed(10, 0)), ("lost", lost)];

fn happens(rig: &mut Rig, event: Event) -> String {
    let before = rig.phase();
    let effects = rig.feed(event);
    let next = match ended(&effects) {
        Some(end) => end,
        None if before == "Ended" => "(ended)".into(),
        None => rig.phase().into(),
    };
    [list(&effects), next].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" -> ")
}

#[test]
fn all_pairs_of_misfortunes_in_every_phase() {
    let mut lines = Vec::new();
    for state in STATES {
        for (first, event) in EVENTS {
            let mut rig = state();
            lines.push(format!("{}: {first}: {}", rig.phase(), happens(&mut rig, event())));
            if rig.phase() == "Ended" {
                // Whatever comes now is for nobody.
                for (_, second) in EVENTS {
                    assert_eq!(happens(&mut rig, second()), "(ended)");
                }
                continue;
            }
            for (second, then) in EVENTS {
                let mut rig = state();
                let _ = rig.feed(event());
                if first == second && first == "failed save" && rig.phase() != "Salvaging" {
                    let _ = rig.pass(0.5).feed(Event::Retry { slot: 0 });
                }
                lines.push(format!("    then {second}: {}", happens(&mut rig, then())));
            }
        }
    }
    let lines = lines.join("\n");
    assert!(lines == PAIRS.trim(), "this happens:\n{lines}");
}

const PAIRS: &str = "
Loading: notice: report notice, hush, note -> stopped: aws-spot before the first step: nothing to save
Loading: exit: died after 5: worker 1 was killed
Loading: failed save: Loading
    then notice: report notice, hush, note -> stopped: aws-spot before the first step: nothing to save
    then exit: died after 5: worker 1 was killed
    then failed save: Loading
    then lost: Fenced: another node has the run
Loading: lost: Fenced: another node has the run
Training: notice: report notice, hush, note, report drain, hush, freeze -> Draining
    then notice: report notice, hush, note -> Draining
    then exit: kill -> Salvaging
    then failed save: idle, report warning, retry slot 0 -> Draining
    then lost: Fenced: another node has the run
Training: exit: kill -> Salvaging
    then notice: report notice, hush, note, report drain, hush, freeze, kill -> Salvaging
    then exit: kill -> Salvaging
    then failed save: idle, report warning, hush, upload 10, busy, kill -> Salvaging
    then lost: Fenced: another node has the run
Training: failed save: idle, report warning, retry slot 0 -> Training
    then notice: report notice, hush, note, report drain, hush, freeze, hush, upload 10, busy -> Draining
    then exit: kill, hush, upload 10, busy -> Salvaging
    then failed save: idle, report warning, retry slot 0 -> Training
    then lost: Fenced: another node has the run
Training: lost: Fenced: another node has the run
Draining: notice: report notice, hush, note -> Draining
    then notice: report notice, hush, note -> Draining
    then exit: kill -> Salvaging
    then failed save: idle, report warning, retry slot 0 -> Draining
    then lost: Fenced: another node has the run
Draining: exit: kill -> Salvaging
    then notice: report notice, hush, note, kill -> Salvaging
    then exit: kill -> Salvaging
    then failed save: idle, report warning, hush, upload 10, busy, kill -> Salvaging
    then lost: Fenced: another node has the run
Draining: failed save: idle, report warning, retry slot 0 -> Draining
    then notice: report notice, hush, note -> Draining
    then exit: kill, hush, upload 10, busy -> Salvaging
    then failed save: idle, report warning, retry slot 0 -> Draining
    then lost: Fenced: another node has the run
Draining: lost: Fenced: another node has the run
Salvaging: notice: report notice, hush, note, report drain, hush, freeze, kill -> Salvaging
    then notice: report notice, hush, note, kill -> Salvaging
    then exit: kill -> Salvaging
    then failed save: idle, report warning, hush, upload 10, busy, kill -> Salvaging
    then lost: Fenced: another node has the run
Salvaging: exit: kill -> Salvaging
    then notice: report notice, hush, note, report drain, hush, freeze, kill -> Salvaging
    then exit: kill -> Salvaging
    then failed save: idle, report warning, hush, upload 10, busy, kill -> Salvaging
    then lost: Fenced: another node has the run
Salvaging: failed save: idle, report warning, hush, upload 10, busy, kill -> Salvaging
    then notice: report notice, hush, note, report drain, hush, kill -> Salvaging
    then exit: kill -> Salvaging
    then failed save: idle, report warning, kill -> died after 12: worker 1 was killed
    then lost: Fenced: another node has the run
Salvaging: lost: Fenced: another node has the run
";

#[test]
fn a_stall_that_is_heard_of_late_reaches_the_save_under_way() {
    let mut rig = training();
    let effects = rig.feed(said(Rank(1), FromWorker::Stalled { step: Step(10), stall_s: 0.25 }));
    let [Effect::Cost(cost)] = effects.list() else { panic!("{effects:?}") };
    assert_eq!((cost.stall_s, cost.copy_s), (0.25, 0.5));
    let effects = rig.feed(said(Rank(1), FromWorker::Stalled { step: Step(9), stall_s: 0.25 }));
    assert_eq!(list(&effects), "", "not of this one");
}
