//! `trainer simulate` from outside: its figures, its wording, and its errors.

use std::path::Path;

use serde_json::Value;

use crate::support::{
    lab::{EVERY, GLOBAL_BATCH, Lab, ORIGIN, STEPS, data_set},
    trainer::{Finished, Trainer},
};

/// `trainer simulate` with these arguments, separated by spaces, in a folder where `trace` is a file.
fn simulate(arguments: &str, trace: Option<&[u8]>) -> Finished {
    let folder = tempfile::tempdir().expect("a folder");
    if let Some(trace) = trace {
        std::fs::write(folder.path().join("trace"), trace).expect("write trace");
    }
    Trainer::new(folder.path(), &["simulate"]).args(&arguments.split_whitespace().collect::<Vec<_>>()).finish()
}

fn json(life: Finished) -> Value {
    let life = life.expect_code(0);
    serde_json::from_str(&life.stdout).unwrap_or_else(|error| panic!("{error}\n{}", life.story()))
}

fn row<'a>(report: &'a Value, policy: &str, notice: bool) -> &'a Value {
    let rows = report["spot"].as_array().expect("rows");
    rows.iter().find(|row| row["policy"] == policy && row["notice"] == notice).expect("the row")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

const TABLE: &str = "--lifetimes spot --mtbf 2h --trials 40 --seed 1 --reserved-price 0.6";

#[test]
fn the_table_states_every_saving_with_its_inputs_and_its_baseline() {
    let life = simulate(TABLE, None).expect_code(0);
    assert_eq!(life.stdout, include_str!("fixtures/simulate.txt"), "{}", life.story());
    assert!(life.stderr.is_empty(), "{}", life.story());
}

/// Daly's published optima for 5-minute dumps, and the closed form compared with the simulation.
#[test]
fn json_has_dalys_optima_and_figures_that_agree() {
    for (mtbf, minutes) in [("24h", 117.0), ("6h", 57.0), ("15m", 9.1)] {
        let line = format!(
            "--json --mtbf {mtbf} --stall 5m --durable 5m --restart 1m --work 60d --trials 60 --notice-share 0.5 \
            --notice 6m"
        );
        let report = json(simulate(&line, None));
        assert!((number(&report["daly_s"]) / 60.0 / minutes - 1.0).abs() < 0.02, "{report}");
        assert!(number(&report["daly_share_of_best"]) > 0.999, "{report}");
        for row in report["spot"].as_array().expect("rows").iter().filter(|row| row["model_goodput"].is_number()) {
            // With a save every 2 h nothing of a life of 15 min is ever kept.
            let Some(played) = row["goodput"].as_f64() else { continue };
            let error = 0.01 * played + 3.0 * number(&row["goodput_error"]);
            assert!((played - number(&row["model_goodput"])).abs() < error, "{row}");
        }
        let (auto, on_demand) = (row(&report, "auto", true), &report["baselines"][0]);
        let saving = 1.0 - number(&auto["cost"]) / number(&on_demand["cost"]);
        assert!((number(&auto["saving_against_on_demand"]) - saving).abs() < 1e-9 && on_demand["name"] == "on-demand");
    }
}

/// Idle nodes that wait for others are paid for, in the closed form and in the simulation.
#[test]
fn several_nodes_agree_with_the_model_too() {
    for together in ["0", "0.5", "1"] {
        let line = "--json --mtbf 40h --nodes 4 --wait 10m --durable 20s --work 60d --trials 60 --notice-share 0";
        let report = json(simulate(&format!("{line} --together {together}"), None));
        let best = row(&report, "best fixed", false);
        let (played, model) = (number(&best["goodput"]), number(&best["model_goodput"]));
        assert!((played / model - 1.0).abs() < 0.003, "{played} instead of {model} with {together}");
    }
}

/// A group that may shrink is done earlier than one that waits, and the other rows are those of `--nodes`.
#[test]
fn an_elastic_group_is_a_row_beside_the_group_that_waits() {
    let line = "--mtbf 10h --wait 2h --trials 20 --work 10d --notice-share 0.5";
    let elastic = json(simulate(&format!("{line} --json --elastic 1:4 --reform 30s"), None));
    let rigid = json(simulate(&format!("{line} --json --nodes 4"), None));
    assert_eq!(elastic["inputs"]["elastic"], serde_json::json!({"min": 1, "max": 4, "reform_s": 30.0}));
    assert!(rigid["inputs"].get("elastic").is_none(), "{rigid}");
    for notice in [false, true] {
        assert_eq!(row(&elastic, "auto", notice), row(&rigid, "auto", notice));
        let (loose, waits) = (row(&elastic, "auto, elastic", notice), row(&elastic, "auto", notice));
        assert!(number(&loose["wall_s"]) < 0.9 * number(&waits["wall_s"]), "{loose} {waits}");
        assert!(loose["model_goodput"].is_null(), "{loose}");
    }
    let text = simulate(&format!("{line} --elastic 1:4"), None).expect_code(0).stdout;
    for said in ["elastic   or 1 to 4 nodes, which form anew in 20", "The elastic group (with notice) is done in "] {
        assert!(text.contains(said), "{text}");
    }
}

/// The example that `src/goodput/trace.rs` computes by hand, once as counts and once as changes.
#[test]
fn a_trace_is_replayed_as_computed_by_hand() {
    let counts = r#"{"metadata":{"gap_seconds":50},"data":[1,1,0,1,1,0]}"#;
    let changes = "0,add,a\n100000,remove,a\n150000,add,b\n250000,remove,b\n300000,add,c\n300000,remove,c\n";
    for trace in [counts, changes] {
        let line =
            "--json --trace trace --stall 5s --durable 10s --restart 10s --work 200s --every 30s --notice-share 0";
        let report = json(simulate(&format!("{line} --trials 1"), Some(trace.as_bytes())));
        let row = row(&report, "configured", false);
        let found = ["wall_s", "interruptions", "lost_s"].map(|name| number(&row[name]));
        assert_eq!(found, [490.0, 3.0, 60.0], "{row}");
        assert!((number(&row["node_hours"]) - 340.0 / 3600.0).abs() < 1e-9 && row["model_goodput"].is_null(), "{row}");
        assert!((number(&row["goodput"]) - 200.0 / 340.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn it_says_plainly_when_spot_does_not_pay() {
    let dear = simulate("--spot-price 0.99 --trials 10 --work 1d", None).expect_code(0);
    assert!(dear.stdout.contains("Spot does not pay (auto, without notice): ") && !dear.stdout.contains("Spot pays"));
    let hopeless = simulate("--mtbf 10s --restart 10m --trials 2", None).expect_code(0);
    let said = "Spot does not pay (auto, without notice): the job is not done after 100000 machines";
    assert!(hopeless.stdout.contains(said) && hopeless.stdout.contains("never"), "{}", hopeless.story());
}

#[test]
fn a_run_and_its_configuration_give_the_inputs_without_a_flag() {
    let lab = Lab::on_interrupted_run();
    let report = json(lab.about("simulate", ORIGIN).args(&["--json", "--trials", "2", "--work", "1d"]).finish());
    for name in ["stall_s", "durable_s"] {
        assert!(report["inputs"][name]["from"].as_str().is_some_and(|from| from.starts_with("the run")), "{report}");
    }
    assert_eq!((&report["inputs"]["work_s"]["from"], &report["inputs"]["nodes"]), (&"given".into(), &1.into()));
    let lab = Lab::on_files();
    let line = ["simulate", "run.toml", "--step-time", "90s", "--json", "--trials", "2", "--work", "1d"];
    let report = json(lab.command(&line).finish());
    assert_eq!(number(&row(&report, "configured", false)["interval_s"]), 90.0 * EVERY as f64, "{report}");
    lab.command(&["simulate", "run.toml"]).finish().expect_code(64).expect_said(&["steps", "--step-time"]);
}

#[test]
fn absurd_flags_are_refused() {
    for (line, said) in [
        ("--mtbf 0s", "more than 0s"),
        ("--mtbf=-5h", "a duration"),
        ("--mtbf 99999d", "at most 3650d"),
        ("--notice-share 1.5", "from 0 to 1"),
        ("--together nan", "from 0 to 1"),
        ("--spot-price inf", "a price"),
        ("--on-demand-price 0", "a price"),
        ("--nodes 0", "--nodes"),
        ("--nodes 4000000000", "--nodes"),
        ("--trials 0", "--trials"),
        ("--every 0s", "at least 1s"),
        ("--work 2h --stall x", "a duration"),
        ("--trace t --mtbf 2h", "cannot be used with"),
        ("--trace t --elastic 1:2", "cannot be used with"),
        ("--nodes 2 --elastic 1:2", "cannot be used with"),
        ("--elastic 3:2", "MIN:MAX"),
        ("--elastic 0:2", "MIN:MAX"),
        ("--elastic 1:9999", "MIN:MAX"),
        ("--elastic 4", "MIN:MAX"),
        ("--reform 9s", "--elastic"),
    ] {
        simulate(line, None).expect_code(64).expect_said(&[said]);
    }
}

#[test]
fn a_malformed_trace_is_refused_with_its_line() {
    for (trace, said) in [
        (&b""[..], "it is empty"),
        (b"{\"metadata\":{\"gap_seconds\":60},\n\"data\":[1,-3]}", "line 2"),
        (b"{\"metadata\":{\"gap_seconds\":60},\"data\":[NaN]}", "line 1"),
        (b"0,add,a\n1,remove,b\n", "line 2: removes a node that is not there"),
        (b"\xff\xfe\x00", "utf-8"),
    ] {
        simulate("--trace trace", Some(trace)).expect_code(78).expect_said(&["trace", said]);
    }
    let missing = Trainer::new(Path::new("/"), &["simulate", "--trace", "no-such-trace"]).finish();
    missing.expect_code(78).expect_said(&["no-such-trace"]);
}

#[test]
fn epochs_are_the_steps_that_the_data_gives_them() {
    let lab = Lab::on_files();
    let text = lab.config("").replace(&format!("steps = {STEPS}"), "epochs = 3");
    lab.write_config("epochs.toml", &text);
    let simulate =
        |more: &[&str]| lab.command(&["simulate", "epochs.toml", "--json", "--trials", "2"]).args(more).finish();
    let report = json(simulate(&["--step-time", "2s"]));
    let index: Value = serde_json::from_slice(&std::fs::read(data_set().join("index.json")).unwrap()).unwrap();
    let tokens = index["train"].as_array().unwrap().iter().map(|shard| shard["tokens"].as_u64().unwrap());
    let sequences: u64 = tokens.map(|tokens| (tokens - 1) / 32).sum();
    let steps = (3 * sequences).div_ceil(GLOBAL_BATCH.into());
    assert_eq!(number(&report["inputs"]["work_s"]["value"]), 2.0 * steps as f64, "{report}");
    assert_eq!(report["inputs"]["work_s"]["from"], format!("{steps} steps (3 epochs) of 2.00 s"));
    // Data that is elsewhere: what is missing is said, and not needed where the work is given.
    lab.write_config("epochs.toml", &text.replace(&data_set().display().to_string(), "/nowhere"));
    let life = simulate(&["--step-time", "2s"]);
    assert!(life.code() != Some(0), "{}", life.story());
    let _ = life.expect_said(&["train.epochs = 3", "/nowhere", "--work"]);
    let report = json(simulate(&["--step-time", "2s", "--work", "3h"]));
    assert_eq!(number(&report["inputs"]["work_s"]["value"]), 3.0 * 3600.0);
}
