//! Answers of services, for tests of the sources.

use proptest::prelude::*;

/// What a metadata service might answer: anything, JSON of any shape, and JSON that is nearly right.
pub fn odd_answer() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("action"),
        Just("time"),
        Just("noticeTime"),
        Just("NotBefore"),
        Just("EventId"),
        Just("Code"),
        Just("State"),
        Just("Events"),
        Just("EventType"),
        Just("EventStatus"),
        Just("Resources"),
        Just("DurationInSeconds"),
        Just("deadline_s"),
        Just("terminate"),
        Just("active"),
        Just("system-reboot"),
        Just("Preempt"),
        Just("Freeze"),
        Just("Scheduled"),
        Just("Started"),
        Just("me"),
        Just("2017-09-18T08:22:00Z"),
        Just("-009999-01-01T00:00:00Z"),
        Just("Mon, 19 Sep 2016 18:29:47 GMT"),
    ];
    let text = prop_oneof![word.clone().prop_map(str::to_owned), ".{0,200}"];
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        text.prop_map(Into::into),
    ];
    let json = leaf.prop_recursive(4, 40, 8, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..8).prop_map(Into::into),
            proptest::collection::vec((word.clone(), inner), 0..8)
                .prop_map(|members| members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()),
        ]
    });
    prop_oneof![any::<String>(), json.prop_map(|json| json.to_string())]
}
