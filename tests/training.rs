//! The promises of training itself: a validation loss, bfloat16 that resumes exactly, gradient accumulation, and an end
//! when it diverges.

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, interrupted, sample_text},
    trainer::losses,
};

/// Settings added to the lab's.
fn with<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", setting]).collect()
}

#[test]
fn the_validation_loss_is_measured_when_it_is_due_and_is_the_same_after_a_resume() {
    let lab = Lab::on_files();
    // Many documents, so that some are kept for validation.
    std::fs::create_dir(lab.path("texts")).unwrap();
    for (number, text) in sample_text().as_bytes().chunks(2000).enumerate() {
        std::fs::write(lab.path(&format!("texts/{number}.txt")), text).unwrap();
    }
    let (texts, data) = (lab.path("texts").display().to_string(), format!("file://{}", lab.path("data").display()));
    lab.command(&["data", "prepare", "--input", &texts, "--tokenizer", "train:512"])
        .args(&["--validation-ratio", "0.2", "--out", &data])
        .finish()
        .expect_code(0);
    let train = format!("data.train={data}");
    let settings = with(&[&train, "data.validation_every=6", "data.validation_sequences=6"]);
    let whole = lab.run("whole").args(&settings).finish().expect_code(0);
    let measured: Vec<_> =
        whole.of_kind("validation").iter().map(|e| (e.step(), e.number_text("loss").map(str::to_owned))).collect();
    let steps: Vec<_> = measured.iter().map(|(step, _)| step.unwrap()).collect();
    assert_eq!(steps, [6, 12, 18, 24], "{}", whole.story());
    // `checkpoint.keep.best` ranks a checkpoint by the loss of its own state.
    let told: Vec<(u64, bool)> = lab
        .keys("whole", "journal/")
        .iter()
        .map(|key| serde_json::from_slice::<serde_json::Value>(&lab.read("whole", key)).unwrap()["record"].clone())
        .filter(|record| record["kind"] == "committed")
        .map(|record| (record["step"].as_u64().unwrap(), record["validation_loss"].is_number()))
        .collect();
    assert!(told.iter().all(|(step, measured)| *measured == step.is_multiple_of(6)), "{told:?}");
    assert!(told.contains(&(24, true)), "{told:?}");

    let first = lab.run("killed").args(&settings).hold_after(2 * EVERY + 1).start();
    first.wait_for_step("checkpoint", 2 * EVERY);
    first.power_off().expect_killed();
    let second = lab.resume("killed").finish().expect_code(0);
    for event in second.of_kind("validation") {
        let again = (event.step(), event.number_text("loss").map(str::to_owned));
        assert!(measured.contains(&again), "{again:?} is not in {measured:?}");
    }
    assert!(!second.of_kind("validation").is_empty(), "{}", second.story());
}

#[test]
fn bfloat16_with_accumulated_gradients_resumes_to_the_last_digit() {
    let settings = with(&["train.precision=bf16", "train.max_micro_batch=2"]);
    let lab = Lab::on_files();
    let whole = lab.run("whole").args(&settings).finish().expect_code(0);
    let first = lab.run("killed").args(&settings).hold_after(EVERY + 2).start();
    first.wait_for_step("step", EVERY + 2);
    let first = first.power_off().expect_killed();
    let second = lab.resume("killed").finish().expect_code(0);
    assert_eq!(losses(&[&first, &second]), losses(&[&whole]));
    assert!(lab.export("killed") == lab.export("whole"), "weights differ");
    let fp32 = lab.run("fp32").args(&with(&["train.max_micro_batch=2"])).finish().expect_code(0);
    assert_ne!(losses(&[&fp32]), losses(&[&whole]), "bf16 changed nothing");
}

#[test]
fn a_run_that_diverges_stops_and_names_the_last_good_checkpoint() {
    let lab = Lab::on_interrupted_run();
    let begun = interrupted().step;
    // The first update ruins the weights, and the next loss shows it: a checkpoint saved in between can't be trusted.
    let life = lab
        .resume(ORIGIN)
        .args(&with(&["train.optimizer.lr=1e38", "train.optimizer.grad_clip=0"]))
        .finish()
        .expect_code(78)
        .expect_said(&["diverged", &format!("last good checkpoint is step {begun};"), "--set train.optimizer.lr"]);
    assert!(life.of_kind("completed").is_empty());
    lab.resume(ORIGIN)
        .args(&["--from", &begun.to_string()])
        .args(&with(&["train.optimizer.lr=1e-3", "train.optimizer.grad_clip=1.0"]))
        .finish()
        .expect_code(0);
}
