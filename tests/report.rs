//! `trainer report`: its account of a real run, its page, and the page in a real browser.
//!
//! With TRAINER_TESTS_ALL a headless Chromium opens reports of runs of days with 0, 1 and 40 interruptions at three
//! widths, light and dark: nothing is cut off or scrolls sideways, nothing is written to its console, axe-core finds no
//! barrier, and the validator of HTML finds no mistake. The pictures lie in `target/report/`; one of them is
//! `src/page/report.png`. `tests/report/setup` installs the tools; without them that part says so and passes.

mod sample;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use serde_json::Value;

use self::sample::Sample;
use crate::support::{
    lab::{EVERY, Lab, STEPS},
    trainer::Trainer,
};

const ONE: Sample = Sample { name: "once", interruptions: 1, steps: 6_000, every: 200 };
const NONE: Sample = Sample { name: "calm", interruptions: 0, ..ONE };
const FORTY: Sample = Sample { name: "stormy", interruptions: 40, steps: 24_000, every: 100 };
/// The run of the manual's picture.
const SHOWN: Sample = Sample { name: "reports-2026q4", interruptions: 7, steps: 20_000, every: 200 };

fn account(json: &str) -> Value {
    serde_json::from_str(json).expect("a JSON line")
}

/// The parts of an account add up to the whole.
fn adds_up(report: &Value) -> f64 {
    let account = &report["account"];
    let parts = account["parts"].as_array().expect("parts");
    let sum: f64 = parts.iter().map(|part| part["seconds"].as_f64().expect("seconds")).sum();
    let whole = account["whole_s"].as_f64().expect("a number");
    assert!((sum - whole).abs() < 1e-6 * whole.max(1.0), "{sum} and {whole}: {report}");
    whole
}

fn seconds(report: &Value, activity: &str) -> f64 {
    let parts = report["account"]["parts"].as_array().expect("parts");
    let part = parts.iter().find(|part| part["activity"] == activity);
    part.map_or(0.0, |part| part["seconds"].as_f64().expect("seconds"))
}

#[test]
fn a_run_that_was_killed_twice_has_an_account_and_a_page() {
    let lab = Lab::on_files();
    let killed = |life: Trainer, at: &str| {
        let life = life.faults(at).args(&["--set", "restart.max=0"]).finish();
        assert_ne!(life.code(), Some(0), "{}", life.story());
    };
    killed(lab.run("told"), &format!("worker.step=kill@step={}", 2 * EVERY + 2));
    killed(lab.resume("told"), &format!("journal.after-append=kill@step={}", 3 * EVERY));
    lab.resume("told").finish().expect_code(0);
    let page = lab.path("report.html").display().to_string();
    let prices = ["--price-per-hour", "3.6", "--on-demand-price-per-hour", "7.2"];
    let told = lab.about("report", "told").args(&["--out", &page, "--json"]).args(&prices).finish().expect_code(0);
    let report = account(&told.stdout);
    let whole = adds_up(&report);
    assert_eq!(report["account"]["useful_steps"], STEPS, "{report}");
    assert_eq!(report["account"]["generations"].as_array().map(Vec::len), Some(3), "{report}");
    assert!(seconds(&report, "productive") > 0.0 && seconds(&report, "starting") > 0.0, "{report}");
    assert!(seconds(&report, "productive") < whole, "{report}");
    let spent = report["bill"]["spent"].as_f64().expect("a price is known");
    let machines: f64 =
        report["account"]["parts"].as_array().unwrap().iter().map(|p| p["machine_seconds"].as_f64().unwrap()).sum();
    assert!((spent - machines * 1e-3).abs() < 1e-9, "{report}");
    let html = std::fs::read_to_string(&page).expect("a page");
    for part in ["<h1>Run told</h1>", "vanished", "Where the time went", "--price-per-hour", "Completed"] {
        assert!(html.contains(part), "{part:?} in\n{html}");
    }
    assert!(!html.contains("<script"));
    let summary = lab.about("report", "told").finish().expect_code(0).stdout;
    assert!(summary.contains("productive steps") && summary.contains("no price is known"), "{summary}");
}

#[test]
fn wrong_prices_and_runs_that_are_not_there_are_named() {
    let lab = Lab::on_files();
    let store = lab.path("store");
    sample::write(&store, Sample { steps: 400, ..NONE });
    std::fs::write(lab.path("prices.toml"), "[machines.\"g6.xlarge\"]\nspot = 0.35\non_demand = 0.81\n")
        .expect("write");
    let table = lab.path("prices.toml").display().to_string();
    let about = |arguments: &[&str]| lab.about("report", NONE.name).args(arguments).finish();
    let told = about(&["--json", "--prices", &table, "--instance-type", "g6.xlarge"]).expect_code(0);
    let report = account(&told.stdout);
    assert_eq!(report["bill"]["prices"][0]["usd_per_hour"], 0.35, "{report}");
    let from = report["bill"]["baseline"]["prices"][0]["from"].as_str().expect("a source");
    assert!(from.starts_with("on_demand of g6.xlarge in ") && from.ends_with("prices.toml"), "{from}");
    about(&["--prices", &table, "--instance-type", "p5"]).expect_code(64).expect_said(&["\"p5\"", "g6.xlarge"]);
    about(&["--prices", "nowhere.toml"]).expect_code(78).expect_said(&["read prices nowhere.toml"]);
    about(&["--instance-type", "p5"]).expect_code(64).expect_said(&["--prices"]);
    about(&["--price-per-hour", "-1"]).expect_code(64);
    about(&["--out", "nowhere/report.html"]).expect_code(64).expect_said(&["nowhere/report.html"]);
    lab.about("report", "another").finish().expect_code(78);
}

/// The runs of the pictures, as the account has them: what was written is what is found.
#[test]
fn the_account_of_a_long_run_is_what_was_written() {
    let lab = Lab::on_files();
    let store = lab.path("store");
    sample::write(&store, Sample { steps: 4_000, ..FORTY });
    let report = account(&lab.about("report", FORTY.name).args(&["--json"]).finish().expect_code(0).stdout);
    adds_up(&report);
    assert_eq!((&report["interruptions"], &report["account"]["useful_steps"]), (&40.into(), &4_000.into()));
    // 1.1 s a step.
    let productive = seconds(&report, "productive");
    assert!((productive - 4_400.0).abs() < 1.0, "{productive}");
    let notes = report["account"]["notes"].as_array().expect("notes");
    assert!(notes.is_empty(), "{notes:?}");
}

/// The folder of the tools; `None`, with a line on standard output, if they are not installed.
fn tools() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/report/setup");
    let output = Command::new(script).arg("--where").output().ok()?;
    let place = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    if !output.status.success() || !place.is_dir() {
        println!("skipped: tests/report/setup installs a browser and the checkers of pages");
        return None;
    }
    Some(place)
}

#[test]
fn reports_are_whole_in_a_browser() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        return;
    }
    let Some(tools) = tools() else { return };
    let lab = Lab::on_files();
    let store = lab.path("store");
    let pictures = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/report");
    std::fs::create_dir_all(&pictures).expect("a folder");
    let mut pages = Vec::new();
    for sample in [NONE, ONE, FORTY, SHOWN] {
        sample::write(&store, sample);
        let page = pictures.join(format!("{}.html", sample.name)).display().to_string();
        let prices = ["--price-per-hour", "0.3521", "--on-demand-price-per-hour", "1.006"];
        lab.about("report", sample.name).args(&["--out", &page]).args(&prices).finish().expect_code(0);
        pages.push(page);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/report/look.mjs");
    let output = Command::new("node").arg(script).arg(&tools).arg(&pictures).args(&pages).output().expect("start node");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    let shown = std::fs::metadata(pictures.join("readme.png")).expect("the manual's picture");
    assert!(shown.len() <= 150_000, "{} bytes", shown.len());
    let vnu = tools.join("node_modules/vnu-jar/build/dist/vnu.jar");
    let output = Command::new("java").args(["-jar"]).arg(vnu).arg("--stdout").args(&pages).output();
    match output {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) => println!("skipped: the validator needs java: {error}"),
    }
}

#[test]
fn the_report_of_a_million_steps_is_small() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        return;
    }
    let lab = Lab::on_files();
    let store = lab.path("store");
    sample::write(&store, Sample { name: "long", interruptions: 40, steps: 1_000_000, every: 1_000 });
    let page = lab.path("report.html");
    let begun = Instant::now();
    lab.about("report", "long").args(&["--out", &page.display().to_string()]).finish().expect_code(0);
    let size = std::fs::metadata(&page).expect("a page").len();
    println!("a million steps: {size} bytes after {:.1} s", begun.elapsed().as_secs_f64());
    assert!(size < 5_000_000, "{size} bytes");
}
