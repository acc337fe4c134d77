//! What machines boot with: every file of `userdata/` held against the tools and schemas that know its format, and against rules
//! of our own where those tools are known to miss mistakes; the stack created, the loop executed, User Data run for real.
use crate::support::moto::Moto;

#[test]
fn moto_says_what_it_does_and_forgets_when_told() {
    let Some(moto) = Moto::start("bucket") else { return };
    let queue = moto.json("sqs", "AmazonSQS.CreateQueue", &serde_json::json!({"QueueName": "jobs"}));
    assert!(queue["QueueUrl"].as_str().is_some_and(|url| url.ends_with("/jobs")), "{queue}");
    let list = |moto: &Moto| moto.json("sqs", "AmazonSQS.ListQueues", &serde_json::json!({})).to_string();
    assert!(list(&moto).contains("/jobs"));
    let stacks = moto.query("cloudformation", "2010-05-15", "DescribeStacks", &[]);
    assert!(stacks.contains("DescribeStacksResponse"), "{stacks}");
    assert!(moto.log().contains("\"PUT /bucket HTTP/1.1\" 200"), "{}", moto.log());
    moto.reset();
    assert!(!list(&moto).contains("/jobs"));
    moto.make_bucket("bucket");
}
