//! A workload made of a real dataset in a folder: what its workers are told, what its checkpoints get, what it refuses.

use serde_json::{Value, json};

use super::*;
use crate::{
    checkpoint::testing::{self, memory_store},
    config::{Device, RunConfig},
    data::{PrepareSettings, TokenizerSource, prepare},
    error::Kind,
    ids::{NodeId, Rank},
    journal::{Formed, FormedReason, Journal, RosterEntry, Succession},
    report::Reporter,
};

const STORE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4321);

/// A dataset in a folder, and the configuration of a run that trains on it.
async fn prepared() -> (tempfile::TempDir, RunConfig) {
    let folder = tempfile::tempdir().unwrap();
    let (texts, data) = (folder.path().join("texts"), folder.path().join("data"));
    std::fs::create_dir(&texts).unwrap();
    for number in 0..20 {
        let text = format!("document {number} says {} things\n", number * 7).repeat(60);
        std::fs::write(texts.join(format!("{number}.txt")), text).unwrap();
    }
    let uri = format!("file://{}", data.display());
    let tokenizer = TokenizerSource::Train { vocab: 300 };
    prepare(PrepareSettings::new(vec![texts.display().to_string()], tokenizer, uri.as_str()), |_| {}).await.unwrap();
    let mut config = testing::config();
    let task = &mut config.workload;
    task.model.config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    });
    (task.data.train, task.data.sequence_length, task.data.validation_every) = (uri, 32, 7);
    (task.train.threads, task.parallel.device) = (3, Device::Cpu);
    (folder, config)
}

fn site(reporter: &Reporter) -> Site<'_> {
    Site { nproc_per_node: Some(2), cache: None, reporter }
}

#[tokio::test]
async fn a_worker_learns_its_task_and_nothing_else_of_the_configuration() {
    let (_folder, mut config) = prepared().await;
    config.store = "s3://private/runs".into();
    (config.notice.file, config.storage.kms_key_id) = (Some("/run/stop".into()), Some("alias/private".into()));
    let workload = Workload::of_new_run(&config, site(&Reporter::silent())).await.unwrap();
    let ranks = NodeRanks { first: Rank(2), workers: 2, world: WorldSize(4) };
    let assignment = workload.assignment(LocalRank(1), ranks, Generation(4), Step(9), STORE).unwrap();
    let wire = serde_json::to_string(&assignment).unwrap();
    assert!(!wire.contains("private") && !wire.contains("/run/stop") && !wire.contains("price"), "{wire}");
    let Assignment { rank, local_rank, world_size, generation, resume_step, store, several_nodes, task } = assignment;
    let alone = workload.assignment(LocalRank(1), NodeRanks::alone(2), Generation(4), Step(9), STORE).unwrap();
    assert!(several_nodes && !alone.several_nodes);
    assert_eq!((rank, local_rank, world_size), (Rank(3), LocalRank(1), WorldSize(4)));
    assert_eq!((generation, resume_step, store), (Generation(4), Step(9), STORE));
    let task = Task::read(task).unwrap();
    assert_eq!((&task.config, &task.data), (&config.workload, workload.data()));
    assert!(task.data_dir.join(layout::TOKENIZER).is_file());
    let threads = workload
        .command(&Collectives::default())
        .get_envs()
        .any(|(name, value)| name == "OMP_NUM_THREADS" && value == Some("3".as_ref()));
    assert!(threads);
}

#[tokio::test]
async fn a_checkpoint_gets_what_makes_it_a_model_folder_and_where_training_stands() {
    let (_folder, config) = prepared().await;
    let workload = Workload::of_new_run(&config, site(&Reporter::silent())).await.unwrap();
    let outline = workload.outline(WorldSize(2));
    assert_eq!((outline.workers, outline.last, outline.tokens), (2, Step(2000), 32 * 32));
    assert_eq!(outline.validated_every, NonZeroU64::new(7));
    let files = workload.small_files(Step(40), Bytes::from_static(b"{}")).unwrap();
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    let expected = [
        layout::MODEL_CONFIG,
        layout::GENERATION_CONFIG,
        layout::TOKENIZER,
        layout::TOKENIZER_CONFIG,
        layout::MODEL_INDEX,
        layout::TRAINER_STATE,
    ];
    assert_eq!(names, expected);
    let state = TrainerState::parse("state", &files[5].1).unwrap();
    assert_eq!((state.step, state.samples, state.data.as_ref()), (Step(40), 40 * 32, Some(workload.data())));
    let model: Value = serde_json::from_slice(&files[0].1).unwrap();
    assert_eq!(model["vocab_size"], 300);
    assert!(workload.small_files(Step(u64::MAX), Bytes::new()).is_err(), "too many samples to count");
    assert!(workload.beginning().await.unwrap().is_none(), "weights from the seed");
}

#[tokio::test]
async fn parts_that_do_not_fit_are_refused_before_a_run_exists() {
    let (_folder, config) = prepared().await;
    let reporter = Reporter::silent();
    type Change = fn(&mut TrainTask);
    let cases: [(Change, &str); 5] = [
        (|task| task.model.config["vocab_size"] = json!(200), "model.config"),
        (|task| task.data.sequence_length = 65, "the model takes at most 64"),
        (|task| task.train.global_batch = 1, "train.global_batch = 1 is too small for 2 workers"),
        (|task| task.data.train.push('x'), "no prepared dataset"),
        (|task| task.model.init_from = Some("file:///nowhere".into()), "there is no folder file:///nowhere"),
    ];
    for (change, part) in cases {
        let mut config = config.clone();
        change(&mut config.workload);
        let error = Workload::of_new_run(&config, site(&reporter)).await.unwrap_err();
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

#[test]
fn a_model_folder_with_a_pipe_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let uri = format!("file://{}", folder.path().display());
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let pipe = |name: &str| {
        let path = folder.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    };
    // Others are of no concern.
    pipe("control");
    initial::open(&uri, &testing::STORAGE).unwrap();
    for name in ["model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "config.json"] {
        pipe(name);
        let error = initial::open(&uri, &testing::STORAGE).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.to_string().contains(name) && error.to_string().contains("pipe"), "{error}");
        std::fs::remove_file(folder.path().join(name)).unwrap();
    }
}

#[tokio::test]
async fn a_run_keeps_its_data_unless_a_person_names_other_data() {
    let (_folder, config) = prepared().await;
    let reporter = Reporter::silent();
    let own = Workload::of_new_run(&config, site(&reporter)).await.unwrap().data().clone();
    let other = DatasetId { index: "0123456789abcdef".into(), ..own.clone() };
    let foreign = DatasetId { vocabulary: "0123456789abcdef".into(), ..own.clone() };
    for (data, accepted, refusal) in [
        (own, false, None),
        (other.clone(), false, Some("is not the one that run run was trained on")),
        (other, true, None),
        (foreign, true, Some("another tokenizer")),
    ] {
        let (run, node, run_id) = (memory_store(), NodeId::random(), RunId::new("run").unwrap());
        let mut journal = Journal::create(run.clone(), node.clone(), run_id, config.clone()).await.unwrap();
        let formed = Formed {
            roster: vec![RosterEntry::new(node, 2)],
            world_size: WorldSize(2),
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: Some(data),
            succession: Succession::default(),
        };
        journal.form(formed).await.unwrap();
        let found = Workload::of_existing_run(&config, site(&reporter), &run, journal.state(), accepted).await;
        match refusal {
            None => assert_eq!(found.unwrap().workers(), 2),
            Some(part) => assert!(found.unwrap_err().to_string().contains(part)),
        }
    }
}

#[tokio::test]
async fn epochs_are_steps_of_the_data_that_is_there() {
    let (_folder, mut config) = prepared().await;
    (config.workload.train.steps, config.workload.train.epochs) = (0, 50);
    config.workload.train.schedule.warmup_steps = 0;
    let workload = Workload::of_new_run(&config, site(&Reporter::silent())).await.unwrap();
    let batch = u64::from(config.workload.train.global_batch);
    let steps = (workload.sequences.get() * 50).div_ceil(batch);
    assert!(steps > 1 && workload.last_step() == Step(steps), "{steps}");
    assert_eq!(workload.outline(WorldSize(2)).last, Step(steps));
}
