use jiff::Timestamp;

use super::*;
use crate::{
    history::{
        account::tests::{at, completed, saved, state, stopped, story},
        tests::{created, formed, group},
    },
    journal::Record,
};

fn account(state: &RunState) -> Account {
    Account::of(state, None, at(1e7))
}

fn table(name: &str, text: &str) -> Result<Table, String> {
    Table::parse(Path::new(name), text)
}

const TOML: &str = "machines.\"g6.xlarge\" = { spot = 0.36, on_demand = 0.72 }\n[machines.big]\nspot = 3.6\n\
    [nodes]\nn2 = \"big\"\n";

#[test]
fn a_bill_names_its_prices_and_adds_up() {
    let state = state(story());
    let account = account(&state);
    assert_eq!(Bill::of(&state, &account, &Prices::default()), None, "nobody has named a price");
    let prices = Prices { per_hour: Some(3.6), on_demand: Some(7.2), ..Prices::default() };
    let bill = Bill::of(&state, &account, &prices).unwrap();
    // A tenth of a cent a second.
    let alive = 713.0 - 60.0 - 90.0 - 88.0;
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} and {b}");
    near(bill.spent, alive * 1e-3);
    near(bill.machine_hours, alive / 3600.0);
    near(bill.per_useful_step.unwrap(), alive * 1e-3 / 400.0);
    // 30 s of steps, 9 s of exit, 10 s of start, 1.5 s after a save, 10 s of start.
    near(bill.interruptions, 60.5e-3);
    near(bill.stalls, 2e-3);
    let baseline = bill.baseline.unwrap();
    near(baseline.cost, (alive - 60.5) * 2e-3);
    near(baseline.saving.unwrap(), 1.0 - alive / (2.0 * (alive - 60.5)));
    assert_eq!((bill.prices[0].from.as_str(), bill.prices.len()), ("--price-per-hour", 1));
    assert_eq!(baseline.prices[0].from, "--on-demand-price-per-hour");
    let alone = Prices { per_hour: Some(3.6), ..Prices::default() };
    assert_eq!(Bill::of(&state, &account, &alone).unwrap().baseline, None);
}

#[test]
fn a_table_has_prices_of_kinds_and_kinds_of_nodes() {
    let prices = |kind: Option<&str>| Prices {
        table: Some(table("p.toml", TOML).unwrap()),
        kind: kind.map(str::to_owned),
        ..Prices::default()
    };
    let mixed = state(vec![
        (0.0, created()),
        (0.0, group(1, None, &[("n1", 1), ("n2", 1)])),
        (3600.0, saved(10, 1, 3600.0, 0.0, 0.0)),
    ]);
    let account = account(&mixed);
    let bill = Bill::of(&mixed, &account, &prices(Some("g6.xlarge"))).unwrap();
    assert!((bill.spent - 3.96).abs() < 1e-9, "{}", bill.spent);
    let from: Vec<&str> = bill.prices.iter().map(|price| price.from.as_str()).collect();
    assert_eq!(from, ["spot of g6.xlarge in p.toml", "spot of big in p.toml"]);
    assert_eq!(bill.baseline, None, "no price of a big one that stays");
    assert_eq!(Bill::of(&mixed, &account, &prices(None)), None, "nobody says what n1 is");
    // A flag wins.
    let flag = Prices { per_hour: Some(1.0), ..prices(Some("g6.xlarge")) };
    assert!((Bill::of(&mixed, &account, &flag).unwrap().spent - 2.0).abs() < 1e-9);
    // The configuration comes last.
    let configured = state(vec![
        (0.0, created()),
        (0.0, formed(1, None, &[("run.price_per_hour", "2")])),
        (3600.0, saved(10, 1, 3600.0, 0.0, 0.0)),
    ]);
    let account = self::account(&configured);
    let bill = Bill::of(&configured, &account, &Prices::default()).unwrap();
    assert_eq!((bill.spent, bill.prices[0].from.contains("run.price_per_hour")), (2.0, true));
}

#[test]
fn a_table_that_is_none_says_what_is_wrong() {
    assert!(table("p.json", "{\"machines\": {\"a\": {\"spot\": 0.5}}}").is_ok());
    for (name, text, said) in [
        ("p.json", "machines = 1", "expected value"),
        ("p.toml", "[machines.a]\nspot = 0", "machine a: 0 is no price"),
        ("p.toml", "[machines.a]\nspot = inf", "is no price"),
        ("p.toml", "[machines.a]\nprice = 1", "unknown field"),
        ("p.toml", "[prices]", "prices"),
        ("p.toml", "[machines]\n[nodes]\nn1 = 'x'", "node n1 is a \"x\""),
    ] {
        let error = table(name, text).unwrap_err();
        assert!(error.contains(said), "{error:?} does not say {said:?}");
    }
    let missing = Table::read(Path::new("/nowhere/prices.toml")).unwrap_err();
    assert!(missing.to_string().contains("/nowhere/prices.toml"));
}

/// Lives of an hour each, killed a quarter of an interval after a save: the model expects half an interval.
#[test]
fn a_prediction_stands_beside_what_came_and_the_difference_is_explained() {
    let mut records: Vec<(f64, Record)> = vec![(0.0, created())];
    let mut now = 0.0;
    for life in 0..20_u64 {
        let generation = 2 * life + 1;
        let from = life * 3000;
        records.push((now, formed(generation, (life > 0).then(|| (from, generation - 2)), &[])));
        for save in 1..=10_u64 {
            let lived = 60.0 + 301.0 * save as f64 - 1.0 + 4.0;
            records.push((now + lived, saved(from + 300 * save, generation, lived, 4.0, 1.0)));
        }
        now += 60.0 + 3010.0 + 3.0;
    }
    let last = 41;
    records.push((now, formed(last, Some((60_000, 39)), &[])));
    records.push((now + 364.0, saved(60_300, last, 364.0, 4.0, 1.0)));
    records.push((now + 370.0, completed(60_300, last)));
    let killed = state(records);
    let account = account(&killed);
    let found = Prediction::of(&killed, &account).unwrap();
    assert!((found.expected - 0.92).abs() < 0.02, "{found:?}");
    assert!(found.came > found.expected + SMALL, "{found:?}");
    let lost = &found.terms[2];
    // 20 losses of half an interval of 300 s and of a save, of which three seconds each were seen.
    assert!((lost.expected_s - 20.0 * 153.0).abs() < 40.0 && (lost.came_s - 60.0).abs() < 1.0, "{lost:?}");
    assert!(found.why[0].contains("more than the model expects"), "{:?}", found.why);
    assert!(found.why[1].starts_with("Lost and repeated steps took"), "{:?}", found.why);
    // Without interruptions there is nothing to compare.
    let calm = state(vec![(0.0, created()), (0.0, formed(1, None, &[])), (9.0, saved(9, 1, 9.0, 0.0, 0.0))]);
    assert_eq!(Prediction::of(&calm, &self::account(&calm)), None);
    let drained = state(vec![
        (0.0, created()),
        (0.0, formed(1, None, &[])),
        (100.0, saved(50, 1, 100.0, 2.0, 0.1)),
        (200.0, saved(150, 1, 200.0, 2.0, 0.1)),
        (201.0, stopped(150, 1, 150)),
        (300.0, formed(3, Some((150, 1)), &[])),
        (400.0, saved(250, 3, 100.0, 2.0, 0.1)),
    ]);
    let found = Prediction::of(&drained, &self::account(&drained)).unwrap();
    assert_eq!((found.terms[2].expected_s, found.terms[2].came_s), (0.0, 0.0));
}

#[test]
fn amounts_do_not_depend_on_the_reader_s_clock() {
    let state = state(story());
    let [early, late] = [1e5, 1e7].map(|now| Account::of(&state, None, at(now)));
    assert_eq!(early, late);
    let _: Timestamp = at(0.0);
}
