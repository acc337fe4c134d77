//! The whole command line. A test pins every command and option, so that none is added by accident.

use clap::{Arg, Command, CommandFactory};

use super::*;

fn option(arg: &Arg) -> String {
    let mut text = match (arg.get_long(), arg.get_short()) {
        (Some(long), None) => format!("--{long}"),
        (Some(long), Some(short)) => format!("-{short}/--{long}"),
        _ => arg.get_id().to_string().to_uppercase(),
    };
    if let Some(variable) = arg.get_env() {
        text += &format!(" ({})", variable.to_string_lossy());
    }
    text
}

fn list(command: &Command, path: &str, out: &mut Vec<String>) {
    let name = format!("{path} {}", command.get_name()).trim().to_owned();
    if command.get_subcommands().next().is_none() {
        let options: Vec<String> = command.get_arguments().filter(|arg| arg.get_id() != "help").map(option).collect();
        out.push(format!("{name}: {}", options.join(" ")));
    }
    for inner in command.get_subcommands() {
        list(inner, &name, out);
    }
}

#[test]
fn options_are_added_on_purpose_only() {
    let mut found = Vec::new();
    list(&Cli::command(), "", &mut found);
    assert_eq!(
        found.join("\n"),
        "\
trainer run: CONFIG --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --nproc-per-node --nodes --wait --set \
--metrics-listen (TRAINER_METRICS_LISTEN) --metrics-file (TRAINER_METRICS_FILE) --alert (TRAINER_ALERT) \
--alert-ping (TRAINER_ALERT_PING) --alert-lag (TRAINER_ALERT_LAG) --json
trainer resume: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --from --nproc-per-node --nodes --wait \
--set --metrics-listen (TRAINER_METRICS_LISTEN) --metrics-file (TRAINER_METRICS_FILE) --alert (TRAINER_ALERT) \
--alert-ping (TRAINER_ALERT_PING) --alert-lag (TRAINER_ALERT_LAG) --json
trainer boot: CONFIG --run-id --run-id-template --time-zone --ssm-path --ssm-environment (TRAINER_SSM_ENVIRONMENT) \
--store --nproc-per-node --nodes --wait --set --standby --device-wait \
--metrics-listen (TRAINER_METRICS_LISTEN) --metrics-file (TRAINER_METRICS_FILE) --alert (TRAINER_ALERT) \
--alert-ping (TRAINER_ALERT_PING) --alert-lag (TRAINER_ALERT_LAG) --json
trainer work: --queue (TRAINER_QUEUE) --store (TRAINER_STORE) --allow (TRAINER_ALLOW) --nproc-per-node --idle-exit \
--once --lease --max-hold --terminate-when-idle --device-wait --ssm-path (TRAINER_SSM_PATH) \
--ssm-environment (TRAINER_SSM_ENVIRONMENT) \
--metrics-listen (TRAINER_METRICS_LISTEN) --metrics-file (TRAINER_METRICS_FILE) --alert (TRAINER_ALERT) \
--alert-ping (TRAINER_ALERT_PING) --alert-lag (TRAINER_ALERT_LAG) --json
trainer runs: --store (TRAINER_STORE) --json
trainer status: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --watch --json
trainer checkpoints: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --json
trainer explain: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --json
trainer metrics: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --json --csv --parquet --tensorboard
trainer report: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --out --price-per-hour \
--on-demand-price-per-hour --prices --instance-type --json
trainer verify: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --step --all --deep --json
trainer drain: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --no-wait --json
trainer wake: --group (TRAINER_GROUP) --region --queue (TRAINER_QUEUE) --machines --release --json
trainer stop: --group (TRAINER_GROUP) --region --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --hold --json
trainer export: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --step --out --merge --dtype \
--max-shard-size --no-compare --json
trainer generate: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --step --prompt --tokens --temperature --seed \
--eos-token --json
trainer prune: --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --keep-last --keep-every --keep-best --damaged \
--dry-run --json
trainer doctor: CONFIG --store (TRAINER_STORE) --run-id (TRAINER_RUN_ID) --nproc-per-node --gpu-memory --instance-type \
--region --count --subnet --image --ami --reads --role --gcp-project --azure-location --json
trainer simulate: CONFIG --run-id (TRAINER_RUN_ID) --store (TRAINER_STORE) --trace --mtbf --lifetimes --nodes \
--elastic --reform --together --wait --stall --durable --restart --notice --notice-share --work --step-time \
--every --on-demand-price --spot-price --reserved-price --trials --seed --json
trainer data prepare: --input --source --tokenizer --out --json --format --pack --sequence-length --documents \
--too-long --without-target --date --chat-template --validation-ratio --text-field --eos-token --shard-tokens \
--sample-bytes --threads --skip-unreadable --bad-records --overwrite
trainer completions: SHELL
trainer worker: "
    );
}

#[test]
fn the_command_line_is_well_formed_and_explained() {
    Cli::command().debug_assert();
    fn explained(command: &Command) {
        assert!(command.get_about().is_some(), "{} says nothing of itself", command.get_name());
        for arg in command.get_arguments() {
            assert!(arg.get_help().is_some(), "{} of {} has no help", arg.get_id(), command.get_name());
        }
        command.get_subcommands().for_each(explained);
    }
    explained(&Cli::command());
}

#[test]
fn a_wrong_command_line_is_refused_with_the_reason() {
    let refused = |line: &str| Cli::try_parse_from(line.split(' ')).unwrap_err().to_string();
    assert!(refused("trainer resume --run-id ../x").contains("has a character other than"));
    assert!(refused("trainer resume --run-id x --from x").contains("--from"));
    assert!(refused("trainer run").contains("CONFIG"));
    assert!(refused("trainer run c.toml --set steps").contains("KEY=VALUE"));
    assert!(refused("trainer run c.toml --nproc-per-node 0").contains("expected \"auto\", or a whole number"));
    assert!(refused("trainer run c.toml --nodes 3:2").contains("expected MIN or MIN:MAX"));
    assert!(refused("trainer boot --nodes 0").contains("expected MIN or MIN:MAX"));
    assert!(refused("trainer resume --run-id x --wait soon").contains("expected \"forever\", or a duration"));
    assert!(refused("trainer work --queue q --nodes 2").contains("unexpected argument '--nodes'"));
    assert!(refused("trainer verify --run-id x --step 1 --all").contains("cannot be used with"));
    assert!(refused("trainer statsu").contains("status"));
    for line in [
        "trainer run c.toml --run-id a --store memory:// --nproc-per-node auto --set a=1 --set b=2 --json",
        "trainer resume --run-id a --from 5 --set a=1",
        "trainer run c.toml --nodes 3 --wait 30m",
        "trainer resume --run-id a --nodes 2:8 --wait forever",
        "trainer boot --nodes 1:4096 --wait 0s",
        "trainer data prepare --input a --input b --tokenizer train:100 --out c",
        "trainer worker",
    ] {
        Cli::try_parse_from(line.split(' ')).unwrap();
    }
}

#[test]
fn errors_show_their_hint_and_cannot_control_the_terminal() {
    let error = Error::new(Kind::Usage, "no run \u{1b}[2J").with_hint("look");
    assert_eq!(said(&error), "error: no run \\u{1b}[2J\nhint: look\n");
    assert_eq!(said(&Error::new(Kind::Bug, "x")), "error: x\n");
    assert_eq!(bug_line(Some("boom"), None), "bug: boom; please report this, with the lines above");
}

#[test]
fn a_thread_that_the_system_refuses_is_no_bug() {
    for said in [
        "failed to spawn thread: Os { code: 11, kind: WouldBlock, message: \"Resource temporarily unavailable\" }",
        "OS can't spawn worker thread: Resource temporarily unavailable (os error 11)",
    ] {
        let error = no_thread(said).unwrap();
        assert_eq!(error.kind(), Kind::Unavailable, "{said}");
        assert!(error.hint().unwrap().contains("ulimit -u"), "{error:?}");
    }
    assert!(no_thread("boom").is_none() && no_thread("Resource temporarily unavailable").is_none());
}
