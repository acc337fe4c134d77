//! Parameters whose names are common beside ours, and parameters that become variables.

use super::{Lab, MetadataServer, TOKEN_OF_THE_API, expect_secret_unseen, machine, plain_config, put_parameters};
use crate::support::{lab::Store, trainer::Running};

/// The environment of a process.
fn environment(pid: i32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/environ")).expect("its environment");
    bytes.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect()
}

fn of_the_agent(running: &Running) -> Vec<String> {
    environment(running.pid().as_raw_nonzero().get())
}

#[test]
fn common_names_are_understood_and_parameters_become_variables_when_asked() {
    let Some(lab) = Lab::on_moto() else { return };
    let Store::Moto(moto) = lab.store.clone() else { unreachable!("made on moto") };
    let (metadata, model) = (MetadataServer::start(), lab.path("model.json").display().to_string());
    let config = plain_config(&model);
    let queue = moto.json("sqs", "AmazonSQS.CreateQueue", &serde_json::json!({"QueueName": "common"}));
    // moto names itself without its port.
    let path = queue["QueueUrl"].as_str().expect("its URL").splitn(4, '/').last().expect("a path");
    let queue = format!("{}/{path}", moto.endpoint());
    put_parameters(
        &moto,
        &[
            ("config", &config),
            ("run-id", "common"),
            ("AWS_S3_BUCKET", "bucket"),
            ("AWS_REGION", "eu-north-1"),
            ("AWS_SQS_QUEUE_URL", &queue),
            ("ECR_REPOSITORY", "trainer"),
            ("!WORKER_TOKEN", TOKEN_OF_THE_API),
            ("!HF_TOKEN", TOKEN_OF_THE_API),
            ("NCCL_DEBUG", "WARN"),
            ("NCCL_IB_HCA", "x"),
            ("OTHER", "x"),
        ],
    );
    let path = ["boot", "--ssm-path", "/trainer/test/", "--ssm-environment", "HF_TOKEN,NCCL_*"];
    let own = [("NCCL_DEBUG", "INFO".to_owned())];
    let running = machine(&lab, &metadata, &moto.endpoint(), &path).envs(&own).json().hold_after(2).start();
    let worker = running.held();
    let agent = of_the_agent(&running);
    for variable in [&format!("HF_TOKEN={TOKEN_OF_THE_API}"), "NCCL_IB_HCA=x", "NCCL_DEBUG=INFO"] {
        assert!(agent.iter().any(|one| one == variable), "{variable} of {}", agent.len());
    }
    assert!(!agent.iter().any(|one| one.starts_with("OTHER=")), "nobody has asked for it");
    let worker = environment(worker.as_raw_nonzero().get());
    assert!(worker.iter().any(|one| one == "NCCL_IB_HCA=x"));
    assert!(!worker.iter().any(|one| one.contains(TOKEN_OF_THE_API)), "workers inherit no secret");
    running.let_go();
    let life = running.finish().expect_code(0).expect_said(&[
        "HF_TOKEN, NCCL_IB_HCA from parameters: starting anew with them",
        "/trainer/test/AWS_REGION names another region than us-east-1",
        "ignoring unknown parameters below /trainer/test: OTHER; --ssm-environment",
        "run common does not exist in s3://bucket/runs",
    ]);
    expect_secret_unseen(&life);
    lab.expect_as_undisturbed("common", &[&life]);

    // The queue's consumer takes the same names, and leaves when the queue stays empty.
    let work = ["work", "--ssm-path", "/trainer/test", "--idle-exit", "1s"];
    let life = machine(&lab, &metadata, &moto.endpoint(), &work).json().finish().expect_code(0);
    expect_secret_unseen(&life);
    assert_eq!(life.of_kind("idle").len(), 1, "{}", life.story());
    let work = ["work", "--ssm-path", "/trainer/other", "--store", "s3://bucket/runs"];
    let none = machine(&lab, &metadata, &moto.endpoint(), &work).finish();
    none.expect_code(64).expect_said(&["no queue is named", "AWS_SQS_QUEUE_URL"]);
}

#[test]
fn no_parameter_decides_which_code_runs() {
    let Some(lab) = Lab::on_moto() else { return };
    let Store::Moto(moto) = lab.store.clone() else { unreachable!("made on moto") };
    let metadata = MetadataServer::start();
    put_parameters(&moto, &[("PATH", "/evil"), ("TRAINER_STORE", "s3://evil/runs")]);
    let boot = |names: &str| {
        let path = ["boot", "--ssm-path", "/trainer/test", "--ssm-environment", names];
        machine(&lab, &metadata, &moto.endpoint(), &path).finish()
    };
    boot("LD_PRELOAD").expect_code(64).expect_said(&["LD_PRELOAD may not come from a parameter"]);
    boot("HF_TOKEN,PATH").expect_code(64).expect_said(&["PATH may not come from a parameter"]);
    boot("T*").expect_code(78).expect_said(&["parameter TRAINER_STORE can't be a variable"]);
    boot("P*").expect_code(78).expect_said(&["parameter PATH can't be a variable"]);
    let nowhere = machine(&lab, &metadata, &moto.endpoint(), &["boot", "--ssm-environment", "HF_TOKEN"]).finish();
    nowhere.expect_code(78).expect_said(&["--ssm-environment HF_TOKEN", "give --ssm-path"]);
}
