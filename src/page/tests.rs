use jiff::Timestamp;

use super::*;
use crate::{
    config::CapsConfig,
    history::{
        cost::Prices,
        episodes::episodes,
        tests::{changed, committed, created, entries, formed, group, state, story},
    },
    ids::{Generation, RunId, Step},
    journal::{Committed, Means, Record},
    metrics::Row,
};

fn figures(steps: u64, generation: u64) -> Series {
    let mut series = Series::default();
    for step in 1..=steps {
        let loss = 10.0 / (1.0 + step as f64 / 100.0) + (step % 7) as f64 * 0.01;
        let figures = [("loss".to_owned(), loss), ("step_s".to_owned(), 0.5)].into();
        series.push(&Row { step: Step(step), generation: Generation(generation), at_ms: step as i64 * 500, figures });
    }
    series
}

fn rendered(state: &RunState, curve: &Series, prices: &Prices) -> String {
    let account = Account::of(state, Some(curve), Timestamp::from_second(2_000_000_000).unwrap());
    let episodes = episodes(state);
    let bill = Bill::of(state, &account, prices);
    let prediction = Prediction::of(state, &account);
    render(&Input {
        state,
        store: "s3://b/runs",
        account: &account,
        episodes: &episodes,
        curve,
        bill: bill.as_ref(),
        prediction: prediction.as_ref(),
        broken: &[],
    })
}

fn priced() -> Prices {
    Prices { per_hour: Some(0.35), on_demand: Some(1.0), ..Prices::default() }
}

/// The elements of a page: each that is opened is closed where it belongs, and no id occurs twice.
fn well_formed(page: &str) -> Vec<String> {
    const ALONE: [&str; 1] = ["meta"];
    let (mut open, mut names, mut ids) = (Vec::<String>::new(), Vec::new(), std::collections::BTreeSet::new());
    let (_, mut rest) = page.split_once('>').unwrap();
    while let Some(at) = rest.find('<') {
        assert!(!rest[..at].contains('>'), "a stray > in {:?}", &rest[..at]);
        let end = at + rest[at..].find('>').unwrap();
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        let name = tag.split(' ').next().unwrap().to_owned();
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()), "{name:?}");
        if let Some((_, id)) = tag.split_once(" id=\"") {
            assert!(ids.insert(id.split('"').next().unwrap().to_owned()), "id {id} occurs twice");
        }
        if name == "style" {
            rest = rest.split_once("</style>").unwrap().1;
            names.push(name);
            continue;
        }
        names.push(name.clone());
        if !ALONE.contains(&name.as_str()) {
            open.push(name);
        }
    }
    assert_eq!(open, [""; 0]);
    names
}

#[test]
fn a_page_has_every_part_and_nothing_that_runs_or_loads() {
    let state = state(story());
    let curve = figures(25, 3);
    let page = rendered(&state, &curve, &priced());
    let names = well_formed(&page);
    for name in ["script", "link", "img", "iframe", "object", "form", "foreignobject"] {
        assert!(!names.iter().any(|found| found == name), "{name}");
    }
    for name in ["svg", "title", "desc", "table", "caption", "details", "h1", "h2"] {
        assert!(names.iter().any(|found| found == name), "no {name}");
    }
    for part in [
        "default-src &#39;none&#39;; style-src &#39;sha256-",
        "<h1>Run first",
        "In progress",
        "<dd>25<small>",
        "4 steps lost",
        "productive steps",
        "the whole",
        "--price-per-hour",
        ">saving<",
        "train.steps = 500",
        "$0.000135 a month",
    ] {
        assert!(page.contains(part), "{part:?} is not in\n{page}");
    }
    assert!(!page.contains("http://") && !page.contains("https://"), "it names no address");
    assert_eq!(page, rendered(&state, &curve, &priced()), "the same input makes the same bytes");
}

#[test]
fn a_run_that_has_done_nothing_has_a_page() {
    let formed = vec![created(), formed(1, None, &[])];
    for (records, cost) in [(vec![created()], "it has cost nothing"), (formed, "No price of a machine")] {
        let page = rendered(&state(records), &Series::default(), &Prices::default());
        well_formed(&page);
        for said in ["No figures of steps", "No save has counted", "no interruption", cost] {
            assert!(page.contains(said), "{said}");
        }
    }
    // A run with a price, caps and no step.
    let mut config = state(vec![created()]).config().clone();
    config.run = CapsConfig { max_hours: Some(1.0), price_per_hour: Some(2.0), ..CapsConfig::default() };
    let run_id = RunId::new("first").unwrap();
    let capped = Record::Created { run_id, config: Box::new(config) };
    well_formed(&rendered(&state(vec![capped]), &Series::default(), &priced()));
}

#[test]
fn hostile_text_is_shown_and_not_obeyed() {
    let evil = "</svg></details><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u{202e}\u{1b}]0;x\u{7}";
    let mut records = story();
    records.push(Record::Notice {
        generation: Generation(3),
        source: evil.into(),
        deadline_s: Some(f64::NAN),
        means: Means::Interruption,
    });
    records.push(Record::Interrupted {
        generation: Generation(3),
        step: Step(25),
        committed: Some(Step(25)),
        lost_steps: 0,
        verdict: evil.repeat(10_000),
        drain: None,
        cap: None,
    });
    records.push(Record::Damaged { step: Step(20), generation: Generation(1), reason: evil.into() });
    let line = evil.replace(char::is_control, "");
    records.push(changed(group(4, Some(3), &[("b", 1)]), &[("n1", &line)], &["b"]));
    records.push(Record::Failed { generation: Generation(4), step: Step(26), reason: evil.into() });
    let state = state(records);
    let mut curve = figures(25, 3);
    for (name, value) in [(evil, 1.0), ("held_out_loss", f64::INFINITY), ("loss", f64::NEG_INFINITY)] {
        let figures = [(name.to_owned(), value)].into();
        curve.push(&Row { step: Step(26), generation: Generation(4), at_ms: i64::MAX, figures });
    }
    let account = Account::of(&state, Some(&curve), Timestamp::MAX);
    let episodes = episodes(&state);
    let broken = [evil.to_owned()];
    let page = render(&Input {
        state: &state,
        store: evil,
        account: &account,
        episodes: &episodes,
        curve: &curve,
        bill: None,
        prediction: None,
        broken: &broken,
    });
    let names = well_formed(&page);
    assert!(!names.iter().any(|name| name == "script" || name == "img"));
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&quot;&#39;&amp;"));
    assert!(!page.contains(['\u{202e}', '\u{1b}', '\u{7}']) && page.len() < 300_000, "{}", page.len());
}

/// A million steps, ten thousand saves and two thousand interruptions.
#[test]
fn the_page_of_a_long_run_is_small() {
    let mut records = vec![created()];
    for generation in 0..2000_u64 {
        // Generation 2 would be a worker's restart.
        let (number, before) = (generation + 10, generation + 9);
        records.push(formed(number, (generation > 0).then(|| (500 * generation, before)), &[]));
        for save in 1..=5 {
            records.push(committed(500 * generation + 100 * save, number));
        }
    }
    let mut entries = entries(records).into_iter();
    let mut state = RunState::begin(&RunId::new("first").unwrap(), entries.next().unwrap()).unwrap();
    for (number, entry) in (1..).zip(entries) {
        state.apply(number, entry).unwrap();
    }
    let curve = figures(1_000_000, 1);
    let page = rendered(&state, &curve, &priced());
    well_formed(&page);
    println!("{} bytes", page.len());
    assert!(page.len() < 1_500_000, "{} bytes", page.len());
    assert!(page.contains("The newest 300 of 1999"));
    let Record::Committed(Committed { step, .. }) = committed(1_000_000, 1) else { panic!("a commit") };
    assert!(page.contains(&format!(">{step}<")), "the last step is shown");
}
