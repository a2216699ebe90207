//! The program from the outside: training, files, resuming, and one clear line for every mistake.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use approx::{abs_diff_eq, relative_eq};

fn polder(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polder")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The message of a mistake: exit code 2, nothing on standard output, one line on standard error.
fn mistake(arguments: &[&str]) -> String {
    let output = polder(arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", text(&output.stdout));
    assert_eq!(message.lines().count(), 1, "{arguments:?}: {message}");
    message
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines = text(&output.stdout);
    assert_eq!(lines.lines().count(), 1, "{lines}");
    serde_json::from_str(&lines).unwrap()
}

/// A small IDX data set of 8×9 images in two classes. The class decides which half is bright.
fn idx_folder(folder: &Path) -> PathBuf {
    for (images, labels, count) in [("train-images", "train-labels", 96u32), ("t10k-images", "t10k-labels", 50)] {
        let mut pixels = vec![0, 0, 8, 3];
        let mut truth = vec![0, 0, 8, 1];
        truth.extend(count.to_be_bytes());
        for extent in [count, 8, 9] {
            pixels.extend(extent.to_be_bytes());
        }
        for sample in 0..count {
            let class = sample * 7 % 3 % 2;
            truth.push(class as u8);
            for pixel in 0..72 {
                let bright = (pixel / 36 == class) as u32 * 120;
                pixels.push((bright + (sample * 31 + pixel * 17) % 97) as u8);
            }
        }
        std::fs::write(folder.join(format!("{images}-idx3-ubyte")), pixels).unwrap();
        std::fs::write(folder.join(format!("{labels}-idx1-ubyte")), truth).unwrap();
    }
    folder.to_path_buf()
}

#[test]
fn training_writes_what_evaluation_reads_and_the_same_seed_gives_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let run = |name: &str, extra: &[&str]| {
        let out = folder.path().join(name);
        let mut arguments =
            vec!["train", "--data", data, "--batch-size", "16", "--epochs", "2", "--device", "cpu", "--json"];
        arguments.extend(["--out", out.to_str().unwrap()]);
        arguments.extend(extra);
        (json(&polder(&arguments)), out)
    };
    for optimizer in [
        "sgd",
        "sam",
        "cr-sam",
        "adamw",
        "asam",
        "random-sam",
        "r-sam",
        "gsam",
        "looksam",
        "gnr",
        "gam",
        "sa-sam",
        "sa-sgd",
    ] {
        let (one, first) = run(&format!("{optimizer}-1"), &["--optimizer", optimizer, "--threads", "1"]);
        let (two, second) = run(&format!("{optimizer}-2"), &["--optimizer", optimizer, "--threads", "2"]);
        assert_eq!(one["test"], two["test"]);
        let model = |run: &Path| std::fs::read(run.join("model.safetensors")).unwrap();
        assert_eq!(model(&first), model(&second), "{optimizer}: one and two threads");
        let (_, other) = run(&format!("{optimizer}-3"), &["--optimizer", optimizer, "--seed", "1"]);
        assert_ne!(model(&first), model(&other), "{optimizer}: another seed");

        let weights = first.join("model.safetensors");
        let logits = folder.path().join("logits.npy");
        let found = json(&polder(&[
            "eval",
            "--model",
            "resnet8",
            "--init",
            weights.to_str().unwrap(),
            "--data",
            data,
            "--device",
            "cpu",
            "--batch-size",
            "7",
            "--logits",
            logits.to_str().unwrap(),
            "--json",
        ]));
        assert_eq!(found["samples"], 50);
        assert_eq!(found["errors"], one["test"]["errors"], "{optimizer}");
        let (a, b) = (found["loss"].as_f64().unwrap(), one["test"]["loss"].as_f64().unwrap());
        assert!(abs_diff_eq!(a, b, epsilon = 1e-6), "batches of another size round otherwise: {a} and {b}");
        let bytes = std::fs::read(&logits).unwrap();
        let npy = npyz::NpyFile::new(&bytes[..]).unwrap();
        assert_eq!(npy.shape(), [50, 2]);
    }
    let log = std::fs::read_to_string(folder.path().join("sam-1/log.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 2);
    let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!((&last["kind"], &last["epoch"], &last["step"]), (&"epoch".into(), &2.into(), &12.into()));
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let runs = [
        ("cr-sam", "f32"),
        ("adamw", "bf16"),
        ("sa-sam", "f32"),
        ("looksam", "f32"),
        ("msam", "f32"),
        ("r-sam", "f32"),
        ("sam", "f16"),
        ("muon", "f32"),
        ("sassha", "f16"),
        ("sampa", "f16"),
    ];
    for (optimizer, precision) in runs {
        let common = [
            "train",
            "--data",
            data,
            "--batch-size",
            "16",
            "--device",
            "cpu",
            "--optimizer",
            optimizer,
            "--precision",
            precision,
            "--log-every",
            "1",
        ];
        let whole = folder.path().join(format!("{optimizer}-whole"));
        let parts = folder.path().join(format!("{optimizer}-parts"));
        let (whole_out, parts_out) = (whole.to_str().unwrap(), parts.to_str().unwrap());
        assert!(polder(&[&common[..], &["--epochs", "3", "--out", whole_out]].concat()).status.success());
        // Stop after one epoch and two steps, in the middle of the second. The learning rate must be that of the whole
        // run; SA-SAM computes its own.
        let schedule = if optimizer == "sa-sam" { &[][..] } else { &["--schedule", "constant"] };
        let cut = [&common[..], &["--steps", "8", "--out", parts_out], schedule].concat();
        let constant = folder.path().join(format!("{optimizer}-constant"));
        let uncut = [&common[..], &["--steps", "18", "--out", constant.to_str().unwrap()], schedule].concat();
        assert!(polder(&cut).status.success());
        assert!(polder(&uncut).status.success());
        assert!(polder(&["train", "--resume", parts_out, "--steps", "18"]).status.success());
        let read = |run: &Path, file: &str| std::fs::read(run.join(file)).unwrap();
        assert_eq!(read(&parts, "model.safetensors"), read(&constant, "model.safetensors"), "{optimizer}");
        if optimizer != "sa-sam" {
            assert_ne!(read(&parts, "model.safetensors"), read(&whole, "model.safetensors"));
        }
        let steps = |run: &Path| {
            let log = text(&read(run, "log.jsonl"));
            let mut records: Vec<serde_json::Value> =
                log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            records.retain(|record| record["kind"] == "step");
            // The speed is not part of the result.
            records.iter_mut().for_each(|record| record["images_per_second"] = 0.into());
            records
        };
        assert_eq!(steps(&parts), steps(&constant), "{optimizer}");
        assert_eq!(steps(&parts).len(), 18);
        assert_eq!(steps(&parts)[17]["loss_scale"].is_number(), precision == "f16", "{optimizer}");
        // A finished run can be resumed: it reports its result again.
        let again = json(&polder(&["train", "--resume", parts_out, "--json"]));
        assert_eq!(again["steps"], 18);
        assert!(again["test"]["accuracy"].is_number());
    }
}

/// A run records a step and replays it. A run that logs every step takes them one by one. Both end with the same bits,
/// and so does a run that was stopped and resumed.
#[test]
fn replayed_steps_are_the_steps_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let runs: [&[&str]; 17] = [
        &["--optimizer", "sgd"],
        &["--optimizer", "adamw", "--precision", "bf16"],
        &["--optimizer", "sam", "--precision", "f16", "--warmup", "5"],
        &["--optimizer", "sam", "--m-sharpness", "8", "--micro-batch", "4", "--clip", "0.5"],
        &["--optimizer", "asam", "--base", "adamw"],
        &["--optimizer", "cr-sam"],
        &["--optimizer", "gnr", "--hvp", "exact", "--oracle", "sam"],
        &["--optimizer", "gam"],
        &["--optimizer", "gsam", "--rho-schedule", "lr"],
        &["--optimizer", "sa-sam"],
        &["--optimizer", "msam", "--base", "adamw"],
        &["--optimizer", "wsam"],
        &["--optimizer", "wsam", "--m-sharpness", "8", "--gamma", "0.6"],
        &["--optimizer", "asam", "--base", "muon", "--clip", "0.5"],
        &["--optimizer", "sassha", "--every", "1"],
        &["--optimizer", "sampa", "--mixup", "0.2"],
        &["--optimizer", "sampa", "--precision", "f16", "--base", "adamw"],
    ];
    for (number, run) in runs.into_iter().enumerate() {
        let model = |name: &str, steps: &str, extra: &[&str]| {
            let out = folder.path().join(format!("{number}-{name}"));
            let common = ["train", "--data", data, "--batch-size", "16", "--device", "cpu", "--steps", steps, "--out"];
            let arguments = [&common[..], &[out.to_str().unwrap()], run, extra].concat();
            let done = polder(&arguments);
            assert!(done.status.success(), "{arguments:?}: {}", text(&done.stderr));
            (out.clone(), move || std::fs::read(out.join("model.safetensors")).unwrap())
        };
        let (_, replayed) = model("replayed", "15", &[]);
        let (_, direct) = model("direct", "15", &["--log-every", "1"]);
        assert!(replayed() == direct(), "{run:?}: replayed steps have other bits");
        if number == 2 {
            // The schedule depends on the length of the whole run.
            let constant = ["--schedule", "constant"];
            let (_, whole) = model("whole", "15", &constant);
            let (cut, parts) = model("cut", "8", &constant);
            assert!(polder(&["train", "--resume", cut.to_str().unwrap(), "--steps", "15"]).status.success());
            assert!(whole() == parts(), "{run:?}: resumed and replayed steps have other bits");
        }
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_finishes_the_step_and_the_run_can_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let out = folder.path().join("run");
    let common = ["train", "--data", data.to_str().unwrap(), "--batch-size", "16", "--device", "cpu"];
    let arguments = [&common[..], &["--schedule", "constant", "--steps"]].concat();
    let program = std::env::var("POLDER_PROGRAM").unwrap_or_else(|_| env!("CARGO_BIN_EXE_polder").into());
    let mut child = Command::new(program)
        .args(&arguments)
        .args(["100000", "--out", out.to_str().unwrap()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let checkpoint = out.join("checkpoint/state.safetensors");
    while !checkpoint.exists() {
        assert!(child.try_wait().unwrap().is_none(), "ended before its first epoch");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // Not SIGINT, which a job in the background of a script ignores.
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{message}");
    assert!(message.contains("--resume"), "{message}");
    let (_, after) = message.split_once("interrupted after step ").expect(&message);
    let steps = after.split_once(';').expect(&message).0;
    let saved = std::fs::read(&checkpoint).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&saved).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["step"], steps, "what was told is what was saved");
    // Resumed, it ends with the bits of a run that was not interrupted.
    let more = (steps.parse::<u64>().unwrap() + 20).to_string();
    let resumed = json(&polder(&["train", "--resume", out.to_str().unwrap(), "--steps", &more, "--json"]));
    assert_eq!(resumed["interrupted"], false);
    let whole = folder.path().join("whole");
    assert!(polder(&[&arguments[..], &[&more, "--out", whole.to_str().unwrap()]].concat()).status.success());
    let model = |run: &Path| std::fs::read(run.join("model.safetensors")).unwrap();
    assert!(model(&out) == model(&whole), "interrupted after step {steps}, the run ended with other bits");
}

#[test]
fn a_run_goes_on_only_as_it_was_begun() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let out = folder.path().join("run");
    short_run(folder.path(), data.to_str().unwrap(), &out);
    let path = |name: &str| out.join(name);
    let (config, checkpoint) = (path("config.toml"), path("checkpoint/state.safetensors"));
    let resume = |more: &[&'static str]| [&["train", "--resume", out.to_str().unwrap()], more].concat();
    let settings = std::fs::read_to_string(&config).unwrap();
    // The run is already longer than this, and keeps its settings.
    assert!(polder(&resume(&["--steps", "1"])).status.success());
    assert_eq!(std::fs::read_to_string(&config).unwrap(), settings);
    for other in [String::new(), settings.replace("seed = 0", "seed = 1")] {
        std::fs::write(&config, &other).unwrap();
        let message = mistake(&resume(&["--device", "cpu"]));
        assert!(message.contains("config.toml: `") && message.contains("checkpoint"), "{message}");
        assert_eq!(std::fs::read_to_string(&config).unwrap(), other);
    }
    std::fs::write(&config, &settings).unwrap();
    // A run that was stopped between its last checkpoint and its weights writes them when it is resumed.
    let weights = std::fs::read(path("model.safetensors")).unwrap();
    std::fs::remove_file(path("model.safetensors")).unwrap();
    assert!(polder(&resume(&[])).status.success());
    assert!(std::fs::read(path("model.safetensors")).unwrap() == weights);
    // A changed bit, and a missing checkpoint.
    let good = std::fs::read(&checkpoint).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    std::fs::write(&checkpoint, &bad).unwrap();
    let message = mistake(&resume(&[]));
    assert!(message.contains("state.safetensors: damaged: checksum mismatch"), "{message}");
    std::fs::remove_file(&checkpoint).unwrap();
    let message = mistake(&resume(&[]));
    assert!(message.contains("state.safetensors: is missing"), "{message}");
    assert!(std::fs::read(path("model.safetensors")).unwrap() == weights);
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_no_file_is_written_to_and_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let out = folder.path().join("run");
    short_run(folder.path(), data.to_str().unwrap(), &out);
    let full = folder.path().join("full");
    std::os::unix::fs::symlink("/dev/full", &full).unwrap();
    let output = polder(&["report", out.to_str().unwrap(), "--out", full.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(full.is_symlink());
}

#[test]
fn every_mistake_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let (data, path) = (data.to_str().unwrap(), |name: &str| folder.path().join(name).to_str().unwrap().to_string());
    let says = |arguments: &[&str], words: &[&str]| {
        let message = mistake(arguments);
        assert!(words.iter().all(|word| message.contains(word)), "{arguments:?}: {message}");
    };
    says(&["train", "--lernrate", "1"], &["--lernrate"]);
    says(&["train", "--optimizer", "sgdd"], &["sgdd", "cr-sam"]);
    says(&["train", "--batch-size", "zero"], &["--batch-size", "zero"]);
    says(&["train", "--batch-size", "0"], &["--batch-size", "at least 1"]);
    says(&["train", "--lr", "-1"], &["--lr", "-1"]);
    says(&["train", "--lr", "nan"], &["--lr", "NaN"]);
    says(&["train", "--rho", "0.1", "--optimizer", "sgd"], &["--rho", "sgd"]);
    says(&["train", "--optimizer", "sam", "--gamma", "0.1"], &["--gamma", "sam"]);
    says(&["train", "--p-norm", "inf", "--ascent-steps", "2"], &["--ascent-steps", "--p-norm 2"]);
    says(&["train", "--second-order", "--ascent-steps", "2"], &["--second-order"]);
    says(&["train", "--m-sharpness", "48"], &["--m-sharpness", "48", "128"]);
    says(&["train", "--m-sharpness", "0"], &["--m-sharpness", "at least 1"]);
    says(&["train", "--optimizer", "looksam", "--m-sharpness", "64"], &["--m-sharpness", "looksam"]);
    says(&["train", "--micro-batch", "48"], &["--micro-batch", "48", "--batch-size 128"]);
    says(&["train", "--micro-batch", "0"], &["--micro-batch", "at least 1"]);
    says(&["train", "--m-sharpness", "32", "--micro-batch", "64"], &["--micro-batch", "--m-sharpness 32"]);
    says(&["train", "--optimizer", "gnr", "--oracle-rho", "0.1"], &["--oracle-rho", "--oracle loss"]);
    says(&["train", "--clip", "0"], &["--clip", "above 0"]);
    says(&["train", "--precision", "f8"], &["f8", "f32", "bf16"]);
    says(&["train", "--label-noise", "2"], &["--label-noise", "0 to 1"]);
    says(&["train", "--model", "resnet9"], &["resnet9", "resnet20"]);
    says(&["train", "--model", "resnet18", "--shortcut", "a"], &["--shortcut: ", "resnet18"]);
    says(&["train", "--device", "tpu"], &["--device: ", "tpu"]);
    says(&["train", "--rho", "much"], &["--rho", "much", "a number"]);
    says(&["train", "--init", ""], &["--init: empty"]);
    says(&["train", "--device", "cuda:99"], &["cuda:99"]);
    says(&["train", "--data", &path("nowhere")], &["nowhere"]);
    says(&["train", "--data", ""], &["--data: empty"]);
    says(&["train", "--data", data, "--batch-size", "1000"], &["--batch-size", "96"]);
    says(&["train", "--data", data, "--mean", "0.1,0.2"], &["--mean: 2 numbers, expected 1"]);
    says(&["train", "--data", data, "--std", "0"], &["--std"]);
    says(&["train", "--data", data, "--std", "-1"], &["--std", "above 0"]);
    says(&["curvature", "--model", "resnet8", "--data", data, "--init", "none", "--rho", "-1"], &["--rho", "-1"]);
    says(&["train", "--data", data, "--train-size", "97"], &["--train-size", "97", "96"]);
    says(&["train", "--config", &path("none.toml")], &["none.toml"]);
    std::fs::write(path("bad.toml"), "lr = 0.1\nlerning-rate = 3\n").unwrap();
    says(&["train", "--config", &path("bad.toml")], &["bad.toml", "line 2", "lerning-rate"]);
    std::fs::write(path("rate.toml"), "lr = -1.0\n").unwrap();
    says(&["train", "--config", &path("rate.toml")], &["rate.toml: line 1: lr: -1"]);
    says(&["train", "--config", &path("rate.toml"), "--lr", "-2"], &["--lr: -2"]);
    std::fs::write(path("mean.toml"), "\nmean = [0.5, 0.5]\n").unwrap();
    says(&["train", "--config", &path("mean.toml"), "--data", data], &["mean.toml: line 2: mean: 2 numbers"]);
    std::fs::write(path("both.toml"), "epochs = 3\nsteps = 20\n").unwrap();
    says(&["train", "--config", &path("both.toml")], &["both.toml: line 2: steps", "`epochs`"]);
    says(&["train", "--optimizer", "sa-sam", "--schedule", "step"], &["--schedule", "sa-sam"]);
    says(&["train", "--resume", &path("nowhere")], &["nowhere"]);
    says(
        &["train", "--curvature-every", "1", "--curvature-bn", "train", "--curvature-samples", "250"],
        &["--curvature-samples: 250", "multiple", "--curvature-bn train"],
    );
    says(&["train", "--optmizer", "sam"], &["--optmizer", "did you mean --optimizer?"]);
    says(&["trian"], &["did you mean train?"]);
    says(&["train", "--recipe", "cr-sam/cifar10/resnet18/crsam"], &["--recipe", "did you mean cr-sam/cifar10"]);
    says(&["train", "--recipe", "sa-sam/authors-code", "--base", "adamw"], &["--base", "in the recipe sa-sam"]);
    std::fs::create_dir(path("taken")).unwrap();
    std::fs::write(path("taken/config.toml"), "lr = 0.1\n").unwrap();
    says(&["train", "--data", data, "--batch-size", "16", "--out", &path("taken")], &["taken", "--resume"]);
    std::fs::create_dir(path("empty")).unwrap();
    says(&["train", "--resume", &path("empty")], &["empty", "not a run folder"]);
    std::fs::write(path("garbage.safetensors"), vec![7; 100]).unwrap();
    let eval = ["eval", "--model", "resnet8", "--data", data, "--init"];
    says(&[&eval[..], &[&path("garbage.safetensors")]].concat(), &["garbage.safetensors"]);
    says(&[&eval[..], &[&path("absent.safetensors")]].concat(), &["absent.safetensors"]);
    let out = path("run");
    assert!(polder(&["train", "--data", data, "--batch-size", "16", "--steps", "1", "--out", &out]).status.success());
    let weights = format!("{out}/model.safetensors");
    let other = ["eval", "--model", "resnet20", "--data", data, "--init", &weights];
    says(&other, &["model.safetensors", "missing `layer1.1.bn1.bias`, `layer1.1.bn1.running_mean`"]);
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(path("short.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    says(&[&eval[..], &[&path("short.safetensors")]].concat(), &["short.safetensors"]);
}

/// Averages of weights, SAM-ON, the methods with options of their own, and rates by layer.
#[test]
fn mistakes_in_averages_methods_and_rates_are_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let train = ["train", "--data", data.to_str().unwrap(), "--batch-size", "16", "--epochs", "2", "--device", "cpu"];
    let sampa = |more: &[&'static str]| [&["--optimizer", "sampa"], more].concat();
    let sassha = |more: &[&'static str]| [&["--optimizer", "sassha"], more].concat();
    for (arguments, expected) in [
        (vec!["--ema", "1"], "--ema: 1, expected a number from 0 to below 1"),
        (vec!["--ema", "-0.5"], "--ema: -0.5, expected a number from 0 to below 1"),
        (vec!["--ema", "nan"], "--ema: NaN, expected a number from 0 to below 1"),
        (vec!["--ema", "often"], "invalid value 'often' for '--ema <DECAY>': a number"),
        (vec!["--swa", "-1"], "--swa: -1, expected a finite number, 0 or more"),
        (vec!["--swa", "inf"], "--swa: inf, expected a finite number, 0 or more"),
        (vec!["--swa", "2"], "--swa: 2, but no whole epoch ends after that: the run has 2"),
        (vec!["--swa-anneal", "2"], "--swa-anneal: has no meaning without --swa-lr"),
        (vec!["--swa", "0.5", "--swa-anneal", "2"], "--swa-anneal: has no meaning without --swa-lr"),
        (
            vec!["--swa", "0.5", "--swa-lr", "0.1", "--swa-anneal", "-1"],
            "invalid value '-1' for '--swa-anneal <EPOCHS>': a whole number",
        ),
        (vec!["--swa", "0.5", "--swa-lr", "0"], "--swa-lr: 0, expected a finite number above 0"),
        (vec!["--perturb", "bias"], "invalid value 'bias' for '--perturb <KIND>' [possible values: all, norm]"),
        (vec!["--perturb", "norm", "--optimizer", "asam"], "--perturb: has no meaning for --optimizer asam"),
        (vec!["--perturb", "norm", "--p-norm", "inf"], "--perturb: `norm` needs --p-norm 2"),
        (vec!["--perturb", "norm", "--second-order"], "--perturb: `norm` needs --p-norm 2"),
        (vec!["--perturb", "norm", "--ascent-steps", "2"], "--perturb: `norm` needs --p-norm 2"),
        (vec!["--perturb", "norm", "--freeze", "*bn*"], "--perturb: `norm`, but the network has no"),
        (sampa(&["--lambda", "1.5"]), "--lambda: 1.5, expected a number from 0 to 1"),
        (sampa(&["--lambda", "-0.1"]), "--lambda: -0.1, expected a number from 0 to 1"),
        (vec!["--lambda", "0.2"], "--lambda: has no meaning for --optimizer sam"),
        (sassha(&["--every", "0"]), "--every: 0, expected at least 1"),
        (sassha(&["--every", "1.5"]), "invalid value '1.5' for '--every <K>': a whole number"),
        (sassha(&["--m-sharpness", "4"]), "--m-sharpness: has no meaning for --optimizer sassha"),
        (sampa(&["--micro-batch", "8"]), "--micro-batch: has no meaning for --optimizer sampa: it keeps whole batches"),
        (sampa(&["--m-sharpness", "8"]), "--m-sharpness: has no meaning for --optimizer sampa"),
        (sampa(&["--layer-rate", "fc.*=0.1"]), "--layer-rate: --optimizer sampa needs one rate for all weights"),
        (sampa(&["--layer-decay", "0.5"]), "--layer-decay: --optimizer sampa needs one rate for all weights"),
        (vec!["--layer-rate", "fc.*"], "--layer-rate: fc.*, expected PATTERN=FACTOR"),
        (
            vec!["--layer-rate", "fc.*=-1"],
            "--layer-rate: fc.*=-1, expected PATTERN=FACTOR with a finite number, 0 or more",
        ),
        (vec!["--layer-rate", "head.*=0.1"], "--layer-rate: `head.*` matches no tensor of the model"),
        (vec!["--layer-decay", "1.5"], "--layer-decay: 1.5, expected a number above 0, at most 1"),
    ] {
        let message = mistake(&[&train[..], &arguments].concat());
        assert!(message.contains(expected), "{expected}: {message}");
    }
    // Of the generated images, because those above are too small.
    for model in ["vit-ti-4-droppath", "pyramidnet-110-shakedrop"] {
        let message = mistake(&["train", "--optimizer", "sampa", "--model", model, "--batch-size", "2"]);
        assert!(message.contains("--model: has stochastic depth or ShakeDrop"), "{message}");
    }
}

#[test]
fn the_best_epoch_on_held_out_images_is_evaluated() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (run, plain) = (path("run"), path("plain"));
    let train = ["train", "--train-size", "80", "--batch-size", "8", "--steps", "16", "--threads", "1", "--out"];
    let held = ["--validation", "0.2", "--label-noise", "0.5", "--label-noise-kind", "asymmetric", "--classes", "12"];
    let trained = polder(&[&train[..], &[&run], &held].concat());
    assert!(trained.status.success(), "{}", text(&trained.stderr));
    assert!(text(&trained.stdout).contains("validation loss"), "{}", text(&trained.stdout));
    let eval = |more: &[&str]| polder(&[&["eval", "--threads", "1"][..], more].concat());
    let of_train = json(&eval(&["--run", &run, "--split", "train", "--json"]));
    assert_eq!(of_train["samples"], 64, "without the images that are held out");
    let best = json(&eval(&["--run", &run, "--best", "--json"]));
    let by_file = path("run/best.safetensors");
    assert_eq!(best, json(&eval(&["--run", &run, "--init", &by_file, "--json"])));
    let share = best["top5_accuracy"].as_f64().unwrap();
    assert!(share >= best["accuracy"].as_f64().unwrap() && share <= 1.0, "{best}");
    assert!(text(&eval(&["--run", &run]).stdout).contains("(top five "));

    assert!(polder(&[&train[..], &[&plain]].concat()).status.success());
    assert!(json(&eval(&["--run", &plain, "--json"])).get("top5_accuracy").is_none(), "ten classes");
    let says = |arguments: &[&str], words: &[&str]| {
        let message = mistake(arguments);
        assert!(words.iter().all(|word| message.contains(word)), "{arguments:?}: {message}");
    };
    says(&["eval", "--run", &plain, "--best"], &["plain", "trained without --validation"]);
    says(&["eval", "--run", &run, "--best", "--init", &by_file], &["--best", "given by --init"]);
    says(&["train", "--validation", "1"], &["--validation", "from 0 to below 1"]);
    says(&["train", "--train-size", "8", "--validation", "0.01"], &["--validation", "leaves a part without any"]);
    says(&["train", "--mixup", "1", "--micro-batch", "1"], &["--mixup", "it has one"]);
    says(&["train", "--cutmix", "1", "--m-sharpness", "1"], &["--cutmix", "it has one"]);
    says(&["train", "--mixup", "9"], &["--mixup", "above 0, at most 8"]);
    says(&["train", "--cutmix", "0"], &["--cutmix", "above 0, at most 8"]);
    says(&["train", "--cutout", "65536"], &["--cutout", "at most 65535"]);
    says(&["train", "--erasing", "1.5"], &["--erasing", "from 0 to 1"]);
    says(&["train", "--random-resized-crop", "0"], &["--random-resized-crop", "above 0, at most 1"]);
    says(&["train", "--auto-augment", "svhn"], &["--auto-augment", "cifar10"]);
    says(&["train", "--rand-augment", "2"], &["--rand-augment", "two whole numbers"]);
    says(&["train", "--rand-augment", "2.5,9"], &["--rand-augment", "two whole numbers"]);
    says(&["train", "--rand-augment", "2,31"], &["--rand-augment", "M from 0 to 30"]);
    says(&["train", "--auto-augment", "cifar10", "--rand-augment", "2,9"], &["--rand-augment", "--auto-augment"]);
    says(&["train", "--color-jitter", "0.4,0.4,0.4"], &["--color-jitter", "four numbers"]);
    says(&["train", "--color-jitter", "0.4,0.4,0.4,0.6"], &["--color-jitter", "at most 0.5"]);
}

/// Weights of a model with other classes, without its last layer.
#[test]
fn a_head_is_reset_and_the_rest_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let train = |more: &[&str]| {
        let common = ["train", "--train-size", "16", "--batch-size", "16", "--steps", "1", "--threads", "1", "--seed"];
        polder(&[&common[..], more].concat())
    };
    let (ten, twelve, plain) = (path("ten"), path("twelve"), path("plain"));
    assert!(train(&["1", "--out", &ten]).status.success());
    let init = path("ten/model.safetensors");
    // A rate at which nothing moves.
    let still = ["2", "--lr", "1e-30", "--weight-decay", "0", "--classes", "12"];
    let refused = train(&[&still[..], &["--init", &init]].concat());
    assert!(text(&refused.stderr).contains("tensor `fc."), "{}", text(&refused.stderr));
    assert!(train(&[&still[..], &["--init", &init, "--reset-head", "--out", &twelve]].concat()).status.success());
    assert!(train(&[&still[..], &["--out", &plain]].concat()).status.success());
    let tensor = |run: &str, name: &str| {
        let bytes = std::fs::read(Path::new(run).join("model.safetensors")).unwrap();
        safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().to_vec()
    };
    for (name, from) in [("fc.weight", &plain), ("fc.bias", &plain), ("conv1.weight", &ten), ("bn1.weight", &ten)] {
        assert!(tensor(&twelve, name) == tensor(from, name), "{name}");
    }
    let message = mistake(&["train", "--reset-head"]);
    assert!(message.contains("--reset-head") && message.contains("--init"), "{message}");
}

#[test]
fn a_run_is_tuned_averaged_and_relabelled_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let train = |extra: &[&str]| {
        let arguments = ["train", "--data", data, "--batch-size", "16", "--epochs", "2", "--device", "cpu", "--quiet"];
        let output = polder(&[&arguments[..], extra].concat());
        assert!(output.status.success(), "{extra:?}: {}", text(&output.stderr));
    };
    let (first, second, tuned) = (at("first"), at("second"), at("tuned"));
    train(&["--label-noise", "0.4", "--out", &first]);
    train(&["--bootstrap", &first, "--seed", "1", "--out", &second]);
    // By the labels of the second run every prediction of the first is right.
    let weights = at("first/model.safetensors");
    let eval = |run: &str| {
        let arguments = ["eval", "--run", run, "--init", &weights, "--split", "train", "--device", "cpu", "--json"];
        json(&polder(&arguments))
    };
    assert_eq!(eval(&second)["errors"], 0);
    assert!(eval(&first)["errors"].as_u64().unwrap() > 0);
    let config = std::fs::read_to_string(at("second/config.toml")).unwrap();
    assert!(config.contains("\nbootstrap = { count = 96, checksum = "), "{config}");
    std::fs::rename(&first, at("moved")).unwrap();
    assert!(polder(&["train", "--resume", &second, "--epochs", "3", "--quiet"]).status.success());
    let weights = at("moved/model.safetensors");

    let tune = ["--init", &weights, "--freeze", "conv1.*,bn1.*", "--freeze", "layer1.*", "--freeze-bn"];
    let rates = ["--layer-decay", "0.5", "--layer-rate", "fc.*=2", "--swa", "0.5", "--swa-lr", "0.01", "--out", &tuned];
    train(&[&tune[..], &rates].concat());
    let config = std::fs::read_to_string(at("tuned/config.toml")).unwrap();
    for line in ["freeze = [\"conv1.*\", \"bn1.*\", \"layer1.*\"]", "layer-rate = [\"fc.*=2\"]", "swa-anneal = 1"] {
        assert!(config.lines().any(|other| other == line), "{line}: {config}");
    }
    assert!(Path::new(&at("tuned/swa.safetensors")).exists());
    let message = mistake(&["train", "--resume", &tuned, "--epochs", "3", "--freeze", "conv1.*"]);
    assert!(message.contains("--freeze: cannot change when a run is resumed"), "{message}");

    let begin = ["train", "--data", data, "--batch-size", "16", "--epochs", "2", "--device", "cpu"];
    for (extra, expected) in [
        (&["--freeze", "conv9.*"][..], "--freeze: `conv9.*` matches no tensor of the model; names like it are `conv1."),
        (&["--freeze", "*"], "--freeze: leaves no tensor to train"),
        (&["--layer-rate", "fc.*"], "--layer-rate: fc.*, expected PATTERN=FACTOR"),
        (&["--layer-decay", "0"], "--layer-decay: 0, expected a number above 0, at most 1"),
        (&["--swa", "2"], "--swa: 2, but no whole epoch ends after that: the run has 2"),
        (&["--swa-lr", "0.1"], "--swa-lr: has no meaning without --swa"),
        (&["--bootstrap", &first], "first"),
        (&["--bootstrap", &second, "--label-noise", "0.1"], "--bootstrap: cannot be given together with --label-noise"),
        (&["--bootstrap", &second, "--classes", "3"], "trained on 2 classes of images of [8, 9, 1], this run has 3 of"),
    ] {
        let message = mistake(&[&begin[..], extra].concat());
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

/// The runs of a sweep are those of `polder train`, and a sweep goes on where it was.
#[test]
fn a_sweep_trains_every_combination_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (out, alone) = (path("sweep"), path("alone"));
    let common = ["--train-size", "80", "--batch-size", "8", "--steps", "4", "--validation", "0.2"];
    let vary = ["--vary", "rho=0.05,0.1", "--vary", "lr=0.1,0.05", "--vary", "seed=0,1", "--jobs", "2"];
    let sweep = [&["sweep", "--out", &out], &common[..], &vary, &["--json"]].concat();
    let first = polder(&sweep);
    assert!(first.status.success(), "{}", text(&first.stderr));
    let found = json(&first);
    assert_eq!((&found["runs"], &found["finished"], &found["interrupted"]), (&8.into(), &8.into(), &false.into()));
    assert_eq!(found["report"]["groups"].as_array().unwrap().len(), 4);
    let best = found["best_on_validation"]["runs"].as_str().unwrap();
    assert!(best.starts_with("rho-0") && best.contains("_lr-0"), "{best}");

    let one = ["--rho", "0.1", "--lr", "0.05", "--seed", "1", "--threads", "1", "--out", &alone];
    assert!(polder(&[&["train"], &common[..], &one].concat()).status.success());
    let weights = |run: &str| std::fs::read(Path::new(run).join("model.safetensors")).unwrap();
    let name = "rho-0.1_lr-0.05_seed-1";
    let in_sweep = path(&format!("sweep/{name}"));
    assert!(weights(&alone) == weights(&in_sweep));

    // The page has a map of both numbers.
    let page = std::fs::read_to_string(path("sweep/report.html")).unwrap();
    assert!(page.contains("<h2>Accuracy over settings</h2>"));
    assert_eq!(page.matches("<td style=\"padding:0.4em 0.8em;background:").count(), 4);

    // A run whose result is lost is resumed, the others are left alone, with any number of jobs.
    let results = path("sweep/sweep.json");
    let mut kept: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&results).unwrap()).unwrap();
    let lost = kept.as_object_mut().unwrap().remove(name).unwrap();
    std::fs::write(&results, kept.to_string()).unwrap();
    let again = polder(&[&sweep[..sweep.len() - 3], &["--jobs", "1", "--json"]].concat());
    let lines: Vec<String> = text(&again.stderr).lines().map(String::from).collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with(&format!("8/8  {name}: test accuracy")), "{lines:?}");
    assert_eq!(json(&again)["results"][name], lost);

    // Other settings are another sweep.
    let other = polder(&[&sweep[..], &["--momentum", "0.8"]].concat());
    assert_eq!(other.status.code(), Some(2));
    assert!(text(&other.stderr).contains("--out: ") && text(&other.stderr).contains("other settings"));
}

#[test]
fn a_sweep_of_cases_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sweep");
    let out = out.to_str().unwrap();
    let says = |arguments: &[&str], words: &[&str]| {
        let message = mistake(&[&["sweep", "--out", out], arguments].concat());
        assert!(words.iter().all(|word| message.contains(word)), "{arguments:?}: {message}");
        assert!(!Path::new(out).exists(), "nothing is written");
    };
    says(&[], &["--vary"]);
    says(&["--vary", "rho"], &["--vary: rho: expected"]);
    says(&["--vary", "roh=0.1"], &["--vary", "roh", "no such option"]);
    says(&["--vary", "rho=0.1,x"], &["--vary", "x"]);
    says(&["--vary", "rho=0.1", "--vary", "rho=0.2"], &["--vary", "rho is given twice"]);
    says(&["--rho", "0.1", "--vary", "rho=0.2,0.3"], &["--vary", "rho is given twice"]);
    says(&["--vary", "rho=0.1,0.1"], &["--vary", "two runs have the name rho-0.1"]);
    says(&["--case", "optimizer=sgd rho=0.1"], &["--rho", "in the run optimizer-sgd_rho-0.1"]);
    says(&["--vary", "seed=1", "--jobs", "0"], &["--jobs"]);
    let many: String = (1..102).map(|seed| format!("{seed},")).collect();
    let many = [format!("seed={}", many.trim_end_matches(',')), format!("epochs={}", many.trim_end_matches(','))];
    says(&["--vary", &many[0], "--vary", &many[1]], &["more than 10000 runs"]);

    // Data that are not there are found by each run.
    let cases = ["--case", "optimizer=sgd", "--case", "optimizer=sam rho=0.1", "--train-size", "16"];
    let small = ["--batch-size", "16", "--steps", "1", "--threads", "1", "--data", "/nowhere"];
    let failed = polder(&[&["sweep", "--out", out], &cases[..], &small].concat());
    assert_eq!(failed.status.code(), Some(1));
    let message = text(&failed.stderr);
    assert!(message.contains("optimizer-sgd: ") && message.contains("/nowhere"), "{message}");
    assert!(message.contains("2 runs failed"), "{message}");
}

#[test]
fn a_place_is_the_same_however_it_is_spelled() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let name = data.file_name().unwrap().to_str().unwrap();
    let data = data.to_str().unwrap();
    let run = folder.path().join("run");
    let run = run.to_str().unwrap();
    let slashed = format!("{data}/");
    let train = ["train", "--data", &slashed, "--mean", "0.1", "--std", "0.9", "--train-size", "48"];
    let more = ["--label-noise", "0.5", "--batch-size", "16", "--steps", "2", "--threads", "1", "--out", run];
    assert!(polder(&[&train[..], &more].concat()).status.success());
    let eval = ["eval", "--run", run, "--split", "train", "--threads", "1", "--json"];
    let expected = json(&polder(&eval));
    for spelling in [data.to_string(), slashed, format!("{data}/."), format!("{data}/../{name}")] {
        assert_eq!(json(&polder(&[&eval[..], &["--data", &spelling]].concat())), expected, "{spelling}");
        let resumed = polder(&["train", "--resume", run, "--data", &spelling, "--threads", "1"]);
        assert!(resumed.status.success(), "{spelling}: {}", text(&resumed.stderr));
    }
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let other = idx_folder(&other);
    let copy = [&eval[..], &["--data", other.to_str().unwrap()]].concat();
    assert_eq!(json(&polder(&copy)), expected, "a copy of the images is reduced and relabelled as they are");
    let labels = other.join("train-labels-idx1-ubyte");
    let mut changed = std::fs::read(&labels).unwrap();
    changed[20] ^= 1;
    std::fs::write(&labels, &changed).unwrap();
    assert_eq!(json(&polder(&copy))["samples"], 96, "other images are not reduced");
}

#[test]
fn a_run_knows_its_images_wherever_they_lie() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (first, moved, run) = (path("first"), path("moved"), path("run"));
    std::fs::create_dir(&first).unwrap();
    idx_folder(Path::new(&first));
    let train = ["train", "--data", &first, "--batch-size", "16", "--steps", "2", "--threads", "1", "--out", &run];
    assert!(polder(&train).status.success());
    let eval = ["eval", "--run", &run, "--threads", "1", "--json"];
    let expected = json(&polder(&eval));
    std::fs::rename(&first, &moved).unwrap();
    let resume = ["train", "--resume", &run, "--threads", "1", "--data"];
    assert!(polder(&[&resume[..], &[&moved, "--steps", "3"]].concat()).status.success());

    // A place where nothing is, and images of another kind.
    let gone = path("run/config.toml");
    let config = std::fs::read_to_string(&gone).unwrap();
    std::fs::write(&gone, config.replace("moved", "gone")).unwrap();
    for command in [&["eval", "--run", &run][..], &["train", "--resume", &run]] {
        assert!(mistake(command).contains("give the new place of the run's images"), "{command:?}");
    }
    std::fs::write(&gone, config).unwrap();
    let message = mistake(&["eval", "--run", &run, "--data", "synthetic"]);
    assert!(message.contains("--data: synthetic has images of 3 channels, the run's had 1"), "{message}");

    // The test images alone. Their own statistics would be others than those of the training images.
    let (alone, weights) = (path("alone"), path("run/model.safetensors"));
    let of_run = json(&polder(&eval));
    assert_ne!(of_run, expected, "the third step changed the weights");
    std::fs::create_dir(&alone).unwrap();
    for name in ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"] {
        std::fs::copy(Path::new(&moved).join(name), Path::new(&alone).join(name)).unwrap();
    }
    assert_eq!(json(&polder(&[&eval[..], &["--data", &alone]].concat())), of_run);
    let without_run = ["eval", "--model", "resnet8", "--init", &weights, "--data", &alone, "--threads", "1", "--json"];
    let message = mistake(&without_run);
    assert!(message.contains("--mean: missing") && message.contains("no training images"), "{message}");

    // Other test images are normalised as the run's were, and told.
    let pixels = Path::new(&alone).join("t10k-images-idx3-ubyte");
    let mut darker = std::fs::read(&pixels).unwrap();
    darker[16..].iter_mut().for_each(|pixel| *pixel /= 3);
    std::fs::write(&pixels, &darker).unwrap();
    let other = polder(&[&eval[..], &["--data", &alone]].concat());
    assert!(text(&other.stderr).contains("not the test images of the run"), "{}", text(&other.stderr));
    let config: toml::Table = toml::from_str(&std::fs::read_to_string(path("run/config.toml")).unwrap()).unwrap();
    let recorded = |name: &str| config["images"][name][0].to_string();
    let (mean, std) = (recorded("mean"), recorded("std"));
    assert_eq!(json(&other), json(&polder(&[&without_run[..], &["--mean", &mean, "--std", &std]].concat())));
    assert_eq!((&config["images"]["classes"], &config["images"]["train"]["count"]), (&2.into(), &96.into()));

    // A run does not go on with other images, not even in the same place.
    let images = Path::new(&moved).join("train-images-idx3-ubyte");
    let mut changed = std::fs::read(&images).unwrap();
    changed[500] ^= 1;
    std::fs::write(&images, &changed).unwrap();
    let message = mistake(&[&resume[..], &[&moved]].concat());
    assert!(message.contains("--data: not the images of the run: other training images or labels"), "{message}");
}

#[test]
fn the_number_of_classes_can_be_given() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let (run, logits) = (folder.path().join("run"), folder.path().join("logits.npy"));
    let (run, logits) = (run.to_str().unwrap(), logits.to_str().unwrap());
    let train = ["train", "--data", data.to_str().unwrap(), "--batch-size", "16", "--steps", "1", "--classes"];
    assert!(mistake(&[&train[..], &["1"]].concat()).contains("--classes: label 1 at sample"));
    assert!(polder(&[&train[..], &["5", "--out", run]].concat()).status.success());
    // The number is told where labels leave some out.
    assert!(text(&polder(&[&train[..], &["3"]].concat()).stdout).contains("3 classes, but no image has label 2;"));
    json(&polder(&["eval", "--run", run, "--json", "--logits", logits]));
    assert_eq!(npyz::NpyFile::new(&std::fs::read(logits).unwrap()[..]).unwrap().shape(), [50, 5]);
}

#[test]
fn weights_that_give_no_finite_loss_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let run = folder.path().join("run");
    short_run(folder.path(), data, &run);
    let mut bytes = std::fs::read(run.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].fill(0xff);
    let broken = folder.path().join("broken.safetensors");
    std::fs::write(&broken, bytes).unwrap();
    let message = mistake(&["eval", "--run", run.to_str().unwrap(), "--init", broken.to_str().unwrap()]);
    assert!(message.contains("broken.safetensors: the loss is not finite"), "{message}");
    let out = folder.path().join("landscape");
    let landscape = ["landscape", "--run", run.to_str().unwrap(), "--init", broken.to_str().unwrap(), "--points", "3"];
    let message = mistake(&[&landscape[..], &["--dimensions", "1", "--out", out.to_str().unwrap()]].concat());
    assert!(message.contains("landscape: no point of the landscape has a finite loss"), "{message}");
}

#[test]
fn shells_and_manual_pages_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = text(&polder(&["completions", shell]).stdout);
        assert!(["landscape", "label-smoothing"].iter().all(|word| script.contains(word)), "{shell}: {script}");
    }
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    assert!(polder(&["man", pages.to_str().unwrap()]).status.success());
    let train = std::fs::read_to_string(pages.join("polder-train.1")).unwrap();
    assert!(train.starts_with(".ie") && train.contains(".TH polder-train 1"), "{train}");
    assert!(pages.join("polder.1").is_file() && train.contains("label\\-smoothing"));
}

#[test]
fn a_quiet_run_prints_its_result_alone() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let train = ["train", "--data", data.to_str().unwrap(), "--batch-size", "16", "--steps", "2", "--threads", "1"];
    let lines = |more: &[&str]| text(&polder(&[&train[..], more].concat()).stdout);
    let quiet = lines(&["--quiet"]);
    assert!(quiet.starts_with("test accuracy") && quiet.lines().count() == 1, "{quiet}");
    let out = folder.path().join("run");
    let told = lines(&["--out", out.to_str().unwrap()]);
    assert!(told.contains("epoch   1") && told.contains("next: polder eval"), "{told}");
    let verbose = lines(&["--verbose"]);
    for part in ["optimizer = \"sam\"", "rho = 0.05", "step 2, lr 5.0000e-2, gradient norm ", "test accuracy"] {
        assert!(verbose.contains(part), "{part} in {verbose}");
    }
    assert_eq!(polder(&["train", "--verbose", "--quiet"]).status.code(), Some(2));
}

#[cfg(unix)]
#[test]
fn a_folder_that_another_process_writes_to_is_refused() {
    let Trained { folder, data, run, .. } = &trained();
    let out = folder.path().join("out");
    let held = polder::train::hold(&out).unwrap();
    let out = out.to_str().unwrap();
    for command in [
        &["curvature", "--run", run, "--measure", "grad-norm", "--batch-size", "16", "--out", out][..],
        &["landscape", "--run", run, "--points", "2", "--batch-size", "16", "--out", out],
        &["train", "--data", data, "--batch-size", "16", "--steps", "1", "--out", out],
    ] {
        let message = mistake(command);
        assert!(message.contains("out: another process writes to it"), "{command:?}: {message}");
    }
    drop(held);
    assert!(polder(&["train", "--data", data, "--batch-size", "16", "--steps", "1", "--out", out]).status.success());
}

#[test]
fn devices_lists_the_cpu_and_says_why_there_is_no_gpu() {
    let list = json(&polder(&["devices", "--json"]));
    let devices = list["devices"].as_array().unwrap();
    assert_eq!((&devices[0]["name"], &devices[0]["usable"]), (&"cpu".into(), &true.into()));
    assert!(devices.len() > 1);
    for device in devices.iter().filter(|device| device["usable"] == false) {
        let reason = device["reason"].as_str().unwrap();
        assert!(!reason.is_empty() && !reason.contains('\n'), "{device}");
    }
    assert!(text(&polder(&["devices"]).stdout).starts_with("cpu"));
}

#[test]
fn settings_come_from_the_file_and_flags_win() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let file = folder.path().join("run.toml");
    std::fs::write(
        &file,
        format!("data = {data:?}\noptimizer = \"cr-sam\"\nalpha = 0.3\nepochs = 5\nbatch-size = 16\n"),
    )
    .unwrap();
    let out = folder.path().join("run");
    let arguments = ["train", "--config", file.to_str().unwrap(), "--steps", "2", "--lr", "0.02", "--json", "--out"];
    let found = json(&polder(&[&arguments[..], &[out.to_str().unwrap()]].concat()));
    let options = &found["options"];
    assert_eq!((&options["alpha"], &options["lr"], &options["steps"]), (&0.3.into(), &0.02.into(), &2.into()));
    assert!(options["epochs"].is_null());
    // The written settings are complete: a run from them alone ends with the same weights.
    let again = folder.path().join("again");
    let config = out.join("config.toml");
    json(&polder(&["train", "--config", config.to_str().unwrap(), "--json", "--out", again.to_str().unwrap()]));
    let model = |run: &Path| std::fs::read(run.join("model.safetensors")).unwrap();
    assert_eq!(model(&out), model(&again));
}

/// A run of a few steps in `out`, from a file of weights.
fn short_run(folder: &Path, data: &str, out: &Path) -> String {
    let init = folder.join("init.safetensors");
    let init = init.to_str().unwrap();
    let start = folder.join("start");
    let begun = ["train", "--data", data, "--batch-size", "16", "--steps", "1", "--device", "cpu", "--json", "--out"];
    json(&polder(&[&begun[..], &[start.to_str().unwrap()]].concat()));
    std::fs::copy(start.join("model.safetensors"), init).unwrap();
    let arguments = ["train", "--data", data, "--batch-size", "16", "--steps", "8", "--device", "cpu", "--json"];
    json(&polder(&[&arguments[..], &["--init", init, "--out", out.to_str().unwrap()]].concat()));
    init.into()
}

#[test]
fn a_run_is_resumed_without_the_file_it_began_with_and_as_what_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let (long, short) = (folder.path().join("long"), folder.path().join("short"));
    let init = short_run(folder.path(), data, &short);
    let resume = short.to_str().unwrap();
    // Two processes cannot write to one run.
    let other = std::fs::File::open(&short).unwrap();
    other.try_lock().unwrap();
    assert!(mistake(&["train", "--resume", resume]).contains("short: another process writes to it"));
    drop(other);
    // No file of an earlier run is overwritten, not even weights alone.
    for kept in ["model.safetensors", "log.jsonl"] {
        let left = folder.path().join(format!("left-{kept}"));
        std::fs::create_dir(&left).unwrap();
        std::fs::copy(short.join(kept), left.join(kept)).unwrap();
        let before = std::fs::read(left.join(kept)).unwrap();
        let begun = ["train", "--data", data, "--batch-size", "16", "--steps", "1", "--out", left.to_str().unwrap()];
        let message = mistake(&begun);
        assert!(message.contains("a partial run"), "{message}");
        assert_eq!(std::fs::read(left.join(kept)).unwrap(), before);
    }
    for (option, value) in [("--batch-size", "8"), ("--optimizer", "sgd"), ("--model", "resnet20"), ("--seed", "7")] {
        let message = mistake(&["train", "--resume", resume, option, value]);
        assert!(message.contains(&format!("{option}: cannot change when a run is resumed")), "{message}");
    }
    let message = mistake(&["train", "--resume", resume, "--data", "synthetic"]);
    assert!(message.contains("--data: not the images of the run: 2048 training images instead of 96"), "{message}");
    // 8 of 12 steps end in the middle of the second epoch, whose sums continue after the resumption.
    let steps = ["--steps", "12", "--schedule", "constant", "--json"];
    let constant = ["--schedule", "constant"];
    let begun = ["train", "--data", data, "--batch-size", "16", "--device", "cpu", "--json", "--init", &init];
    std::fs::remove_dir_all(&short).unwrap();
    let to = |out: &Path| out.to_str().unwrap().to_string();
    json(&polder(&[&begun[..], &constant, &["--steps", "8", "--out", &to(&short)]].concat()));
    json(&polder(&[&begun[..], &constant, &["--steps", "12", "--out", &to(&long)]].concat()));
    std::fs::remove_file(&init).unwrap();
    json(&polder(&[&["train", "--resume", resume][..], &steps].concat()));
    let model = |run: &Path| std::fs::read(run.join("model.safetensors")).unwrap();
    assert_eq!(model(&short), model(&long));
    let last = |run: &Path| {
        let log = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
        let record: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        (record["epoch"].clone(), record["train_loss"].clone(), record["train_accuracy"].clone())
    };
    assert_eq!(last(&short), last(&long));
}

#[test]
fn an_optimizer_on_the_command_line_leaves_out_what_the_file_says_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let (file, out) = (folder.path().join("a.toml"), folder.path().join("run"));
    let (file, out) = (file.to_str().unwrap(), out.to_str().unwrap());
    std::fs::write(file, "optimizer = \"sam\"\nbase = \"sgd\"\nrho = 0.2\np-norm = \"2\"\nmomentum = 0.8\nsteps = 1\n")
        .unwrap();
    let common = ["train", "--config", file, "--data", data.to_str().unwrap(), "--batch-size", "16", "--json"];
    json(&polder(&[&common[..], &["--optimizer", "adamw", "--out", out]].concat()));
    let written = std::fs::read_to_string(Path::new(out).join("config.toml")).unwrap();
    assert!(written.contains("optimizer = \"adamw\"") && !written.contains("rho") && !written.contains("momentum"));
    let message = mistake(&[&common[..], &["--optimizer", "sgd", "--rho", "0.1"]].concat());
    assert!(message.contains("--rho: has no meaning for --optimizer sgd"), "{message}");
    let message = mistake(&[&common[..], &["--warmup", "4000"]].concat());
    assert!(message.contains("--warmup: 4000, but the run has "), "{message}");
    let late = ["--optimizer", "sgd", "--schedule", "step", "--milestones", "60"];
    let output = polder(&[&common[..], &late].concat());
    assert!(output.status.success() && text(&output.stderr).contains("does not fall at step "), "{output:?}");
}

#[test]
fn every_option_of_a_method_trains_and_one_group_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let mut number = 0;
    let mut run = |extra: &[&str]| {
        number += 1;
        let out = folder.path().join(number.to_string());
        let common =
            ["train", "--data", data, "--batch-size", "16", "--steps", "4", "--device", "cpu", "--log-every", "2"];
        let found = json(&polder(&[&common[..], extra, &["--json", "--out", out.to_str().unwrap()]].concat()));
        assert_eq!(found["skipped"], 0, "{extra:?}");
        let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
        let step: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        (std::fs::read(out.join("model.safetensors")).unwrap(), step)
    };
    let (plain, step) = run(&[]);
    let between = |value: &serde_json::Value| value.as_f64().is_some_and(|value| value > 0.0 && value < 1.0001);
    assert!(step["sharpness"].as_f64().is_some_and(|rise| rise > 0.0), "{step}");
    assert!(between(&step["cosine_gradients"]) && between(&step["cosine_perturbation"]), "{step}");
    assert_eq!(run(&["--m-sharpness", "16"]).0, plain);
    assert_eq!(run(&["--micro-batch", "16"]).0, plain);
    for extra in [
        &["--m-sharpness", "8"][..],
        &["--micro-batch", "8"],
        &["--m-sharpness", "8", "--micro-batch", "4"],
        &["--ascent-steps", "2"],
        &["--ascent-steps", "2", "--ascent-length", "0.03"],
        &["--second-order"],
        &["--clip", "0.1"],
        &["--rho-schedule", "linear"],
        &["--rho-schedule", "inverse-sqrt"],
        &["--rho-schedule", "lr", "--warmup", "3"],
        &["--perturb", "norm"],
        &["--base", "adamw"],
        &["--optimizer", "gnr", "--hvp", "exact", "--oracle", "sam", "--every", "2"],
        &["--optimizer", "gnr", "--base", "adamw"],
        &["--optimizer", "cr-sam", "--m-sharpness", "4"],
        &["--optimizer", "cr-sam", "--direction", "random", "--form", "released"],
        &["--optimizer", "wsam", "--sharpness", "coupled"],
        &["--optimizer", "gsam", "--rho-schedule", "lr"],
    ] {
        assert_ne!(run(extra).0, plain, "{extra:?}");
    }
    // With a radius of 0 a method is its base optimizer.
    let (base, _) = run(&["--optimizer", "sgd"]);
    for method in ["sam", "asam", "random-sam", "cr-sam", "looksam", "gsam", "gnr", "friendly-sam", "msam"] {
        assert!(run(&["--optimizer", method, "--rho", "0"]).0 == base, "{method}");
    }
    let steps = ["--schedule", "step", "--optimizer", "sgd"];
    assert_ne!(run(&[&steps[..], &["--milestones", "0.25"]].concat()).0, run(&steps).0);
    // What changes nothing is accepted.
    let (own_rate, step) = run(&["--optimizer", "sa-sam"]);
    assert!(run(&["--optimizer", "sa-sam", "--schedule", "constant", "--warmup", "0"]).0 == own_rate);
    assert!(between(&step["eta"]) && between(&step["rho"]), "{step}");
    assert_eq!(step["lr"], step["eta"], "{step}");
}

#[test]
fn curvature_is_measured_over_any_parts_of_the_images() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let init = short_run(folder.path(), data, &folder.path().join("run"));
    let common = ["curvature", "--model", "resnet8", "--init", &init, "--data", data, "--device", "cpu"];
    let run = |extra: &[&str]| polder(&[&common[..], extra].concat());
    let measure = |extra: &[&str]| json(&run(&[&["--samples", "32", "--probes", "3", "--json"], extra].concat()));
    let found = measure(&["--batch-size", "32"]);
    assert_eq!((&found["samples"], &found["split"]), (&32.into(), &"train".into()));
    let value = |found: &serde_json::Value, name: &str| found["measures"][name]["value"].as_f64().unwrap();
    let (norm, trace) = (value(&found, "grad-norm"), value(&found, "trace"));
    assert!(norm > 0.0 && found["measures"]["trace"]["standard_error"].as_f64().unwrap() > 0.0, "{found}");
    assert!(
        relative_eq!(value(&found, "normalized-trace"), trace / norm, epsilon = 0.0, max_relative = 1e-12),
        "{found}"
    );
    // With running statistics the parts matter only for rounding. With the statistics of each batch they matter.
    let parts = measure(&["--batch-size", "8"]);
    let apart = |other: &serde_json::Value, name: &str| (value(other, name) / value(&found, name) - 1.0).abs();
    assert!(apart(&parts, "grad-norm") < 1e-4 && apart(&parts, "trace") < 1e-3, "{parts} and {found}");
    assert!(apart(&measure(&["--batch-size", "8", "--bn", "train"]), "grad-norm") > 1e-3);
    // Without a number all 96 images are used, in as many whole parts as they fill.
    let all = |extra: &[&str]| json(&run(&[&["--measure", "grad-norm", "--json"], extra].concat()))["samples"].clone();
    assert_eq!((all(&[]), all(&["--batch-size", "36"])), (96.into(), 96.into()));
    assert_eq!(all(&["--batch-size", "36", "--bn", "train"]), 72, "a batch's own statistics need whole batches");
    // The last part may be smaller, and counts by its size.
    let list = ["--measure", "grad-norm,trace,vhv,extrema", "--probes", "3", "--json", "--samples", "31"];
    let of_31 = |batch: &str| json(&run(&[&list[..], &["--batch-size", batch]].concat()));
    let (whole, parts) = (of_31("31"), of_31("12"));
    for name in ["grad-norm", "trace", "vhv"] {
        let (a, b) = (value(&whole, name), value(&parts, name));
        assert!(relative_eq!(a, b, epsilon = 0.0, max_relative = 1e-3), "{name}: {whole} and {parts}");
    }
    assert_eq!(whole["measures"]["extrema"], parts["measures"]["extrema"]);
    let list = "vhv,top-eigenvalues,spectrum";
    let spectral = measure(&["--batch-size", "16", "--measure", list, "--top", "2", "--steps", "12"]);
    let numbers = |name: &str, key: &str| -> Vec<f64> {
        spectral["measures"][name][key].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    };
    let (values, nodes) = (numbers("top-eigenvalues", "values"), numbers("spectrum", "nodes"));
    assert!(values.len() == 2 && values[0] > values[1] && values[0] > 0.0, "{spectral}");
    assert!(value(&spectral, "vhv") <= values[0] * 1.001, "{spectral}");
    assert!(abs_diff_eq!(numbers("spectrum", "weights").iter().sum::<f64>(), 1.0, epsilon = 1e-9) && nodes.len() == 36);
    let mean: f64 = nodes.iter().zip(numbers("spectrum", "weights")).map(|(node, weight)| node * weight).sum();
    assert!(abs_diff_eq!(mean * 74906.0 / trace, 1.0, epsilon = 0.05), "{mean} of the trace {trace}");
    let list =
        "trace,hutch++,layer-traces,vhv,vhv-difference,sharpness,m-sharpness,approximation-ratio,gnr,extrema,grad-norm";
    let around = measure(&["--batch-size", "16", "--measure", list, "--rho", "0.01", "--ascent-steps", "5"]);
    let layers = around["measures"]["layer-traces"]["layers"].as_object().unwrap();
    let sum: f64 = layers.values().map(|layer| layer["value"].as_f64().unwrap()).sum();
    assert!(
        layers.len() == 23 && relative_eq!(sum, value(&around, "trace"), epsilon = 0.0, max_relative = 1e-4),
        "{around}"
    );
    let (rise, one_step) = (value(&around, "sharpness"), &around["measures"]["sharpness"]["one_step"]);
    assert!(rise >= one_step.as_f64().unwrap() && one_step.as_f64().unwrap() > 0.0, "{around}");
    // Within so small a radius the loss is nearly its second-order expansion.
    let expected = 0.01 * value(&around, "grad-norm") + 0.5e-4 * value(&around, "vhv");
    assert!(abs_diff_eq!(one_step.as_f64().unwrap() / expected, 1.0, epsilon = 0.1), "{around}: {expected}");
    assert!((value(&around, "gnr") / (0.01 * value(&around, "grad-norm"))) >= 1.0, "{around}");
    let ratio = value(&around, "approximation-ratio");
    assert!(ratio > 0.5 && ratio <= 1.0 && around["measures"]["m-sharpness"]["parts"] == 2, "{around}");
    assert!(value(&around, "hutch++").is_finite() && value(&around, "vhv-difference").is_finite(), "{around}");
    let extrema = &around["measures"]["extrema"];
    let lines = extrema["minima"]["histogram"].as_array().unwrap().iter().map(|lines| lines.as_u64().unwrap());
    assert_eq!((extrema["lines"].as_u64(), lines.sum::<u64>()), (Some(3), 3), "{extrema}");
    assert_eq!(around["measures"]["approximation-ratio"]["not_risen"], 0, "{around}");
    assert!(around["measures"]["vhv-difference"]["rounding_error"].as_f64().unwrap() > 0.0, "{around}");
    let only = measure(&["--batch-size", "16", "--measure", "grad-norm"]);
    assert_eq!(only["measures"].as_object().unwrap().len(), 1);
    let printed = run(&["--samples", "32", "--batch-size", "16", "--probes", "2"]);
    let printed = text(&printed.stdout);
    assert!(printed.lines().count() == 4 && printed.contains("± ") && printed.contains("(2 probes)"), "{printed}");
    for (wrong, words) in [
        (
            &["--samples", "30", "--batch-size", "16", "--bn", "train"][..],
            &["--batch-size: 16", "30 images", "--bn train"][..],
        ),
        (&["--samples", "97"], &["--samples", "97", "96"]),
        (&["--std", "1e-38", "--samples", "32", "--batch-size", "16"], &["init.safetensors", "not finite"]),
        (&["--probes", "0"], &["--probes", "at least 1"]),
        (&["--measure", "top-eigenvalues", "--top", "9", "--steps", "8"], &["--top", "9", "--steps 8"]),
        (&["--tolerance", "nan"], &["--tolerance", "0 or more"]),
        (&["--rho", "0"], &["--rho", "above 0"]),
        (&["--ascent-steps", "0"], &["--ascent-steps", "at least 1"]),
        (&["--measure", "hutch++", "--probes", "2"], &["--probes", "at least 3"]),
        (&["--measure", "flatness"], &["flatness", "normalized-trace"]),
    ] {
        let message = mistake(&[&common[..], wrong].concat());
        assert!(words.iter().all(|word| message.contains(word)), "{wrong:?}: {message}");
    }
}

#[test]
fn curvature_is_logged_during_training_and_after_a_resumption() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let data = data.to_str().unwrap();
    let log = |out: &str| -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(Path::new(out).join("log.jsonl")).unwrap();
        let lines: Vec<_> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        lines.into_iter().filter(|line: &serde_json::Value| line["kind"] == "curvature").collect()
    };
    let common = ["train", "--data", data, "--batch-size", "16", "--device", "cpu", "--json"];
    let measures = ["--curvature-measures", "grad-norm,trace,top-eigenvalues", "--curvature-probes", "3"];
    let out = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (plain, whole, parts) = (out("plain"), out("whole"), out("parts"));
    let train = |extra: &[&str]| json(&polder(&[&common[..], extra].concat()));
    let every = [&["--epochs", "4", "--curvature-every", "2"][..], &measures].concat();
    train(&["--epochs", "4", "--out", &plain]);
    train(&[&every[..], &["--out", &whole]].concat());
    let model = |run: &str| std::fs::read(Path::new(run).join("model.safetensors")).unwrap();
    assert_eq!(model(&plain), model(&whole), "a measurement changes nothing");
    let found = log(&whole);
    let epochs: Vec<_> = found.iter().map(|line| line["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, [2, 4]);
    let last = &found[1]["measures"];
    assert!(last["grad-norm"]["value"].as_f64().unwrap() > 0.0 && last["trace"]["probes"] == 3, "{last}");
    assert_eq!(last["top-eigenvalues"]["values"].as_array().unwrap().len(), 5);
    // The same as `polder curvature` at the final weights, over the same images.
    let run = ["curvature", "--run", &whole, "--probes", "3", "--device", "cpu", "--batch-size", "96", "--json"];
    let after = json(&polder(&run));
    for measure in ["grad-norm", "trace"] {
        let (there, here) = (&after["measures"][measure]["value"], &last[measure]["value"]);
        assert!(
            relative_eq!(there.as_f64().unwrap(), here.as_f64().unwrap(), epsilon = 0.0, max_relative = 1e-5),
            "{measure}: {there} and {here}"
        );
    }
    // Over the test images, with the options of `polder curvature`, and within the method's radius.
    let test = out("test");
    let options =
        ["--curvature-split", "test", "--curvature-samples", "33", "--curvature-top", "2", "--curvature-steps", "20"];
    let more = ["--epochs", "1", "--curvature-every", "1", "--rho", "0.02", "--out", &test, "--curvature-measures"];
    train(&[&options[..], &more, &["top-eigenvalues,sharpness"]].concat());
    let logged = &log(&test)[0]["measures"];
    let like = ["--run", &test, "--split", "test", "--samples", "33", "--top", "2", "--steps", "20", "--rho", "0.02"];
    let list = ["--measure", "top-eigenvalues,sharpness", "--device", "cpu", "--json"];
    let after = json(&polder(&[&["curvature"], &like[..], &list].concat()));
    assert_eq!(after["measures"]["top-eigenvalues"], logged["top-eigenvalues"]);
    assert_eq!(after["measures"]["sharpness"], logged["sharpness"]);
    // A run in two parts. The second finds the line of epoch 2 missing.
    train(&[&["--steps", "12", "--schedule", "constant", "--out", &parts][..], &every[2..]].concat());
    let path = Path::new(&parts).join("log.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let without: Vec<&str> = text.lines().filter(|line| !line.contains("curvature")).collect();
    assert!(without.len() + 1 == text.lines().count(), "{text}");
    std::fs::write(&path, without.join("\n") + "\n").unwrap();
    json(&polder(&["train", "--resume", &parts, "--steps", "24", "--json"]));
    let resumed = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().find(|line| line.contains("curvature")), resumed.lines().find(|l| l.contains("curvature")));
    assert_eq!(log(&parts).len(), 2);
    for (wrong, words) in [
        (&["--curvature-probes", "3"][..], &["--curvature-probes", "without --curvature-every"][..]),
        (&["--curvature-every", "1", "--curvature-samples", "97"], &["--curvature-samples: 97", "96"]),
        (
            &["--curvature-every", "1", "--curvature-split", "test", "--curvature-samples", "51"],
            &["--curvature-samples: 51", "50 test images"],
        ),
        (&["--curvature-every", "1", "--curvature-samples", "0"], &["--curvature-samples: 0"]),
        (&["--curvature-every", "1", "--curvature-probes", "0"], &["--curvature-probes: 0"]),
        (&["--curvature-every", "1", "--curvature-measures", "hutch++", "--curvature-probes", "2"], &["at least 3"]),
    ] {
        let message = mistake(&[&common[..], wrong].concat());
        assert!(words.iter().all(|word| message.contains(word)), "{wrong:?}: {message}");
    }
}

#[test]
fn a_run_ends_when_its_loss_diverges_and_keeps_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let out = folder.path().join("run");
    let common =
        ["train", "--data", data.to_str().unwrap(), "--batch-size", "16", "--device", "cpu", "--optimizer", "sgd"];
    let arguments = ["--lr", "1e6", "--epochs", "50", "--max-loss", "20", "--out", out.to_str().unwrap()];
    for extra in [&[][..], &["--json"]] {
        let _ = std::fs::remove_dir_all(&out);
        let output = polder(&[&common[..], &arguments, extra].concat());
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        let message = text(&output.stderr);
        assert!(message.contains("error: diverged: ") && message.contains("--max-loss 20"), "{message}");
        let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
        let epochs = log.lines().count();
        assert!((1..49).contains(&epochs) && message.contains("log.jsonl"), "{log}");
        if !extra.is_empty() {
            let object: serde_json::Value = serde_json::from_str(&text(&output.stdout)).unwrap();
            assert_eq!((&object["diverged"], &object["interrupted"]), (&true.into(), &false.into()));
            let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
            assert_eq!((&last["diverged"], &last["device"]), (&true.into(), &polder::Device::host().chip().into()));
            let others = log.lines().rev().skip(1);
            assert!(others.clone().all(|line| !line.contains("diverged")), "{log}");
        }
    }
    // It has no weights, and whoever asks for them is told so.
    let output = polder(&["eval", "--run", out.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("run: the run has saved no weights"), "{}", text(&output.stderr));
    // Without a limit the run goes on, and the first signs are told, each once.
    let output = polder(&[&common[..], &["--lr", "100", "--epochs", "90", "--max-loss", "inf", "--quiet"]].concat());
    let warnings = text(&output.stderr);
    let count = |what: &str| warnings.matches(what).count();
    assert_eq!(count("warning: step "), 2, "{warnings}");
    assert_eq!((count("the mean loss has risen from 0.69 to "), count("skipped as not finite")), (1, 1), "{warnings}");
    // So they are in a run of a few steps, whose report does not call it finished.
    let few = ["--lr", "3e38", "--epochs", "3", "--max-loss", "inf", "--out", out.to_str().unwrap()];
    std::fs::remove_dir_all(&out).unwrap();
    let output = polder(&[&common[..], &few].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("skipped as not finite"), "{}", text(&output.stderr));
    let page = folder.path().join("page.html");
    let report = json(&polder(&["report", out.to_str().unwrap(), "--json", "--out", page.to_str().unwrap()]));
    assert_eq!(report["groups"][0]["diverged"].as_array().map(Vec::len), Some(1), "{report}");
    // A run of fewer than fifty steps is checked, too.
    let short = [&common[..], &["--lr", "1e30", "--epochs", "3"]].concat();
    let output = polder(&short);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("no finite loss"), "{}", text(&output.stderr));
    // Diverged weights do not replace good ones.
    let good = folder.path().join("good");
    let good_out = good.to_str().unwrap();
    let constant = ["--schedule", "constant", "--epochs", "1", "--out", good_out];
    assert!(polder(&[&common[..], &constant].concat()).status.success());
    let files = ["model.safetensors", "checkpoint/state.safetensors"];
    let read = || files.map(|file| std::fs::read(good.join(file)).unwrap());
    let before = read();
    let further = polder(&["train", "--resume", good_out, "--epochs", "3", "--max-loss", "0.001"]);
    assert_eq!(further.status.code(), Some(1), "{}", text(&further.stderr));
    assert!(read() == before, "a run that diverged was saved");
    // A run that does not diverge is not stopped.
    let fine = [&common[..], &["--epochs", "2", "--max-loss", "20", "--json"]].concat();
    assert_eq!(json(&polder(&fine))["diverged"], false);
}

/// A trained run, the data that it was trained on, and the weights that it began from.
struct Trained {
    folder: tempfile::TempDir,
    data: String,
    run: String,
    init: String,
}

fn trained() -> Trained {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path()).to_str().unwrap().to_string();
    let run = folder.path().join("run");
    let init = short_run(folder.path(), &data, &run);
    Trained { run: run.to_str().unwrap().into(), folder, data, init }
}

const LANDSCAPE: [&str; 8] = ["landscape", "--device", "cpu", "--samples", "48", "--batch-size", "16", "--json"];

/// What `polder landscape` prints as JSON.
fn landscape(arguments: &[&str]) -> serde_json::Value {
    json(&polder(&[&LANDSCAPE[..], arguments].concat()))
}

/// The lines of a landscape's CSV file.
fn points(folder: &Path) -> Vec<Vec<f64>> {
    let csv = std::fs::read_to_string(folder.join("landscape.csv")).unwrap();
    csv.lines().skip(1).map(|line| line.split(',').map(|cell| cell.parse().unwrap()).collect()).collect()
}

#[test]
fn a_landscape_is_mapped_and_drawn() {
    let Trained { folder: _folder, run, .. } = &trained();
    let found = landscape(&["--run", run, "--points", "3"]);
    assert_eq!((&found["points"], &found["not_finite"]), (&9.into(), &0.into()));
    let out = Path::new(run).join("landscape");
    let rows = points(&out);
    assert_eq!(rows.len(), 9);
    assert_eq!(
        rows.iter().map(|row| (row[0], row[1])).collect::<Vec<_>>()[..4],
        [(-1.0, -1.0), (0.0, -1.0), (1.0, -1.0), (-1.0, 0.0)]
    );
    let npy = |name: &str| {
        let bytes = std::fs::read(out.join(name)).unwrap();
        let file = npyz::NpyFile::new(&bytes[..]).unwrap();
        (file.shape().to_vec(), file.into_vec::<f64>().unwrap())
    };
    let column = |index: usize| rows.iter().map(|row| row[index]).collect::<Vec<f64>>();
    assert_eq!((npy("loss.npy"), npy("accuracy.npy")), ((vec![3, 3], column(2)), (vec![3, 3], column(3))));
    // The middle of the landscape is the model itself.
    let eval = ["eval", "--run", run, "--split", "train", "--samples", "48", "--device", "cpu", "--json"];
    let middle = json(&polder(&eval));
    assert!(abs_diff_eq!(rows[4][2], middle["loss"].as_f64().unwrap(), epsilon = 1e-6), "{middle} and {rows:?}");
    assert_eq!(rows[4][3], middle["accuracy"].as_f64().unwrap());
    assert_ne!(rows[0][2], rows[4][2]);
    let pictures: Vec<&str> = found["pictures"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect();
    let formats = ["svg", "png", "pdf"];
    let names =
        ["contour", "surface", "accuracy"].map(|name| formats.map(|format| format!("{name}.{format}"))).concat();
    assert_eq!(pictures.len(), names.len());
    for (picture, name) in pictures.iter().zip(&names) {
        let bytes = std::fs::read(picture).unwrap();
        let signature = match &name[name.len() - 3..] {
            "png" => &b"\x89PNG"[..],
            "pdf" => b"%PDF",
            _ => b"<svg",
        };
        assert!(picture.ends_with(name.as_str()) && bytes.starts_with(signature), "{picture}");
    }
    // The title names run, model and data.
    let drawn = std::fs::read_to_string(pictures[0]).unwrap();
    let name = Path::new(run).file_name().unwrap().to_str().unwrap();
    assert!(drawn.contains(&format!(">{name} · resnet8")), "{drawn}");
    // An even number of points has none at the weights, and the command says so.
    for (points, said) in [("2", true), ("3", false)] {
        let out = Path::new(run).join(format!("line-{points}"));
        let line = ["--run", run, "--dimensions", "1", "--points", points, "--out", out.to_str().unwrap()];
        let told = text(&polder(&[&LANDSCAPE[..], &line].concat()).stderr);
        assert_eq!(told.contains("no point of the grid is the weights themselves"), said, "{told}");
    }
}

#[test]
fn a_landscape_is_continued() {
    let Trained { folder, run, .. } = &trained();
    landscape(&["--run", run, "--points", "3"]);
    let out = Path::new(run).join("landscape");
    let csv = std::fs::read_to_string(out.join("landscape.csv")).unwrap();
    // After an interruption in the middle of a line, the same command completes the landscape.
    std::fs::write(out.join("landscape.csv"), &csv[..csv.len() / 2]).unwrap();
    landscape(&["--run", run, "--points", "3"]);
    assert_eq!(std::fs::read_to_string(out.join("landscape.csv")).unwrap(), csv);
    // The same holds after the run was moved.
    let moved = folder.path().join("moved");
    std::fs::rename(run, &moved).unwrap();
    landscape(&["--run", moved.to_str().unwrap(), "--points", "3"]);
    std::fs::rename(&moved, run).unwrap();
    // The same holds at coordinates with many digits.
    let fine = folder.path().join("fine");
    let line = ["--run", run, "--dimensions", "1", "--points", "31", "--out", fine.to_str().unwrap()];
    landscape(&line);
    let whole = std::fs::read_to_string(fine.join("landscape.csv")).unwrap();
    std::fs::write(fine.join("landscape.csv"), &whole[..whole.len() / 2]).unwrap();
    landscape(&line);
    assert_eq!(std::fs::read_to_string(fine.join("landscape.csv")).unwrap(), whole);
    // Another landscape is refused.
    let message = mistake(&[&LANDSCAPE[..], &["--run", run, "--points", "4"]].concat());
    assert!(message.contains("landscape") && message.contains("points is 3, not 4"), "{message}");

    // Points without a description are refused.
    let orphan = folder.path().join("orphan");
    std::fs::create_dir(&orphan).unwrap();
    std::fs::copy(out.join("landscape.csv"), orphan.join("landscape.csv")).unwrap();
    let message =
        mistake(&[&LANDSCAPE[..], &["--run", run, "--points", "3", "--out", orphan.to_str().unwrap()]].concat());
    assert!(message.contains("orphan/landscape.csv: points of an unknown landscape"), "{message}");
}

#[test]
fn other_labels_make_another_landscape() {
    let Trained { folder, data, init, .. } = &trained();
    let out = folder.path().join("out");
    // Other labels make another landscape.
    let noisy = folder.path().join("noisy");
    let noise = ["--label-noise", "0.5", "--init", init, "--steps", "1", "--batch-size", "16", "--data", data];
    json(&polder(&[&["train", "--device", "cpu", "--json", "--out", noisy.to_str().unwrap()][..], &noise].concat()));
    let there = ["--points", "2", "--out", out.to_str().unwrap()];
    landscape(&[&["--run", noisy.to_str().unwrap()][..], &there].concat());
    let weights = noisy.join("model.safetensors");
    let clean = ["--model", "resnet8", "--shortcut", "a", "--data", data, "--init", weights.to_str().unwrap()];
    let message = mistake(&[&LANDSCAPE[..], &clean, &there].concat());
    assert!(message.contains("whose images is checksum"), "{message}");
}

#[test]
fn a_landscape_connects_two_models() {
    let Trained { folder, data, run, init } = &trained();
    // Between two models: the first at 0, the second at 1.
    let to = Path::new(run).join("model.safetensors");
    let line = folder.path().join("line");
    let (to, line) = (to.to_str().unwrap(), line.to_str().unwrap());
    let model = ["--model", "resnet8", "--init", init, "--data", data];
    landscape(&[&model[..], &["--to", to, "--points", "3", "--range", "0,1", "--out", line, "--bn", "train"]].concat());
    let (rows, header) = (points(Path::new(line)), std::fs::read_to_string(Path::new(line).join("landscape.csv")));
    assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), [0.0, 0.5, 1.0]);
    assert!(header.unwrap().starts_with("x,loss,accuracy\n"));
    // From the other end it is the same line. (Each batch is normalised with its own statistics, so no running
    // statistics matter.)
    let back = folder.path().join("back");
    let back = back.to_str().unwrap();
    let model = ["--model", "resnet8", "--init", to, "--data", data];
    landscape(
        &[&model[..], &["--to", init, "--points", "3", "--range", "0,1", "--out", back, "--bn", "train"]].concat(),
    );
    for (one, other) in rows.iter().zip(points(Path::new(back)).iter().rev()) {
        assert!(relative_eq!(one[1], other[1], epsilon = 0.0, max_relative = 1e-4), "{one:?} and {other:?}");
    }
}

#[test]
fn a_landscape_follows_an_eigenvector() {
    let Trained { folder, run, .. } = &trained();
    // Along the first eigenvector, the second derivative of the loss is the eigenvalue.
    let eigen = folder.path().join("eigen");
    let eigen = eigen.to_str().unwrap();
    let along = ["--directions", "eigenvectors", "--dimensions", "1", "--points", "3", "--range", "-0.01,0.01"];
    let found = landscape(&[&["--run", run, "--out", eigen][..], &along].concat());
    let name = found["axes"][0]["name"].as_str().unwrap();
    let lambda: f64 = name.split("λ = ").nth(1).unwrap().trim_end_matches(')').parse().unwrap();
    let losses: Vec<f64> = points(Path::new(eigen)).iter().map(|row| row[1]).collect();
    let bend = (losses[0] + losses[2] - 2.0 * losses[1]) / 1e-4;
    assert!(abs_diff_eq!(bend / lambda, 1.0, epsilon = 0.1), "{bend} and {lambda}: {losses:?}");
}

#[test]
fn mistakes_of_a_landscape_are_one_clear_line() {
    let Trained { folder, run, .. } = &trained();
    let to = Path::new(run).join("model.safetensors");
    let to = to.to_str().unwrap();
    let other = folder.path().join("other");
    let other = other.to_str().unwrap();
    landscape(&["--run", run, "--out", other, "--points", "2", "--dimensions", "1"]);
    let blocked = folder.path().join("blocked");
    std::fs::write(&blocked, "a file").unwrap();
    let fresh = folder.path().join("fresh");
    let fresh = fresh.to_str().unwrap();
    for (wrong, words) in [
        (&["--run", run, "--points", "1"][..], &["--points: 1"][..]),
        (&["--run", run, "--range", "1,0"], &["--range: 1,0"]),
        (&["--run", run, "--range", "1"], &["--range: 1 number,"]),
        (&["--run", run, "--range=-1e308,1e308"], &["--range: "]),
        (&["--run", run, "--points", "9223372036854775807"], &["--points: ", "4000000"]),
        (&["--run", run, "--points", "18446744073709551615"], &["--points: ", "at most"]),
        (&["--run", run, "--points", "2001"], &["--points: 2001"]),
        (&["--run", run, "--dimensions", "3"], &["--dimensions", "3"]),
        (&["--run", run, "--samples", "97"], &["--samples", "97"]),
        (&["--run", "no/such/run"], &["no/such/run", "not a run folder"]),
        (&["--run", run, "--model", "resnet20", "--out", other], &["other", "choose another --out"]),
        (&["--run", run, "--model", "resnet20", "--out", fresh], &["model.safetensors", "missing"]),
        (&["--run", run, "--out", blocked.to_str().unwrap()], &["blocked"]),
        (&["--run", run, "--to", to, "--directions", "random"], &["--to", "--directions"]),
        (&["--run", run, "--to", "no/such/file"], &["no/such/file"]),
        (&["--model", "resnet8"], &["--out: missing", "--run"]),
        (&["--run", run, "--seed", "-1"], &["--seed", "-1", "a whole number, 0 or more"]),
        (&["--run", "", "--out", fresh], &["--run: empty"]),
        (&["--model", "resnet8", "--out", fresh], &["--init: missing", "--run"]),
        (&["--out", fresh], &["--run: missing", "--model and --init"]),
    ] {
        let message = mistake(&[&["landscape", "--device", "cpu"][..], wrong].concat());
        assert!(words.iter().all(|word| message.contains(word)), "{wrong:?}: {message}");
    }
}

/// Interrupts a landscape with a signal. Its points stay, and the same command completes it.
#[cfg(unix)]
#[test]
fn an_interrupted_landscape_keeps_its_points() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let run = folder.path().join("run");
    short_run(folder.path(), data.to_str().unwrap(), &run);
    let arguments =
        ["landscape", "--run", run.to_str().unwrap(), "--device", "cpu", "--points", "60", "--samples", "16"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let csv = run.join("landscape/landscape.csv");
    let lines = || std::fs::read_to_string(&csv).map_or(0, |text| text.lines().count());
    while lines() < 4 {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("the same command continues"), "{}", text(&output.stderr));
    let kept = std::fs::read_to_string(&csv).unwrap();
    assert!(kept.ends_with('\n') && (4..3601).contains(&kept.lines().count()), "{}", kept.lines().count());
    let output = polder(&arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let whole = std::fs::read_to_string(&csv).unwrap();
    assert!(whole.starts_with(&kept) && whole.lines().count() == 3601);
}

#[test]
fn findings_are_written_to_files() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let run = folder.path().join("run");
    short_run(folder.path(), data.to_str().unwrap(), &run);
    let (run, out) = (run.to_str().unwrap(), folder.path().join("found"));
    let list = "grad-norm,trace,top-eigenvalues,power-iteration,spectrum,layer-traces";
    let common =
        ["curvature", "--run", run, "--device", "cpu", "--samples", "16", "--batch-size", "16", "--probes", "2"];
    let more = ["--measure", list, "--steps", "60", "--top", "2", "--tolerance", "1e-3"];
    let found = json(&polder(&[&common[..], &more, &["--json", "--out", out.to_str().unwrap()]].concat()));
    let file = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&file("curvature.json")).unwrap(), found);
    let table = file("curvature.csv");
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(lines[0], ["measure", "of", "value", "error"]);
    assert!(lines.iter().all(|line| line.len() == 4), "{table}");
    assert_eq!(lines.len(), 1 + 1 + 1 + 2 + 2 + 23, "{table}");
    let value = |measure: &str, of: &str| -> f64 {
        lines.iter().find(|line| line[0] == measure && line[1] == of).unwrap()[2].parse().unwrap()
    };
    let of = |measure: &str, key: &str| found["measures"][measure][key].clone();
    assert_eq!(of("trace", "value"), value("trace", ""));
    assert_eq!(of("top-eigenvalues", "values")[1], value("top-eigenvalues", "2"));
    let (lanczos, power) = (value("top-eigenvalues", "1"), value("power-iteration", "1"));
    assert!(abs_diff_eq!(power / lanczos, 1.0, epsilon = 1e-2), "{power} and {lanczos}");
    assert_eq!((of("top-eigenvalues", "converged"), &found["split"]), (true.into(), &"train".into()));
    assert_eq!(found["passes"]["gradients"], 1);
    assert!(file("spectrum.csv").starts_with("node,weight\n") && file("spectrum.csv").lines().count() == 121);
    assert!(["svg", "png", "pdf"].iter().all(|format| out.join(format!("spectrum.{format}")).is_file()));
    // With --run everything is taken from the run: the same as given one by one.
    let init = Path::new(run).join("model.safetensors");
    let said = ["--model", "resnet8", "--init", init.to_str().unwrap(), "--data", data.to_str().unwrap()];
    let plain = |model: &[&str]| {
        let mut found = json(&polder(&[&["curvature"], model, &common[3..], &["--json"]].concat()));
        (found["subject"].take(), found)
    };
    let ((by_file, one_by_one), (by_run, of_run)) = (plain(&said), plain(&["--run", run]));
    assert_eq!(one_by_one, of_run);
    // What titles name: the run, or the file of the weights; model and data.
    let data_name = data.file_name().unwrap().to_str().unwrap();
    assert_eq!(by_run, format!("run · resnet8, shortcut a · {data_name}"));
    assert_eq!(by_file, format!("run/model.safetensors · resnet8, shortcut a · {data_name}"));
    let blocked = folder.path().join("blocked");
    std::fs::write(&blocked, "a file").unwrap();
    let message = mistake(&[&common[..], &["--out", blocked.to_str().unwrap()]].concat());
    assert!(message.contains("blocked"), "{message}");
    // A measure that fails does not affect the others. If all fail, the weights are blamed.
    // Of the settings only those are compared that a measure uses.
    let other = |list: &str| mistake(&[&common[..], &["--measure", list, "--out", out.to_str().unwrap()]].concat());
    for list in ["spectrum", "trace,power-iteration"] {
        assert!(other(list).contains("curvature.json: holds measurements of other `steps`"), "{}", other(list));
    }
    assert!(other("trace").contains("curvature.json: already holds trace"), "{}", other("trace"));
    let same = [&common[..], &more[2..], &["--out", out.to_str().unwrap()]].concat();
    let again = mistake(&[&same[..], &["--measure", "trace,spectrum"]].concat());
    assert!(again.contains("curvature.json: already holds trace, spectrum"), "{again}");
    let wild = ["--measure", "grad-norm,sharpness", "--rho", "1e30"];
    let rest = json(&polder(&[&common[..], &wild, &["--json"]].concat()));
    assert!(rest["measures"]["grad-norm"]["value"].as_f64().unwrap() > 0.0, "{rest}");
    assert!(rest["measures"]["sharpness"]["reason"].as_str().unwrap().contains("not finite"), "{rest}");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&file("curvature.json")).unwrap(), found);
    // A measure is added to those that are there, and they keep the settings that they were taken with.
    let plain_steps = [&common[..], &["--out", out.to_str().unwrap()]].concat();
    let added = polder(&[&plain_steps[..], &["--measure", "trace,vhv", "--json"]].concat());
    assert!(text(&added.stderr).contains("curvature.json: already holds trace"), "{}", text(&added.stderr));
    let added = json(&added);
    assert!(added["measures"]["vhv"]["value"].is_f64() && added["passes"]["gradients"] == 2, "{added}");
    let mut without = added["measures"].clone();
    without.as_object_mut().unwrap().remove("vhv");
    assert_eq!(without, found["measures"]);
    assert_eq!((&added["settings"]["steps"], &added["settings"]["tolerance"]), (&60.into(), &1e-3.into()));
    assert_eq!(serde_json::from_str::<serde_json::Value>(&file("curvature.json")).unwrap(), added);
    assert!(file("curvature.csv").contains("vhv,,"), "{}", file("curvature.csv"));
    let sharp = [&common[..], &["--measure", "sharpness", "--rho", "1e30"]].concat();
    assert!(mistake(&sharp).contains("model.safetensors"));
    // --top applies to eigenvalues only.
    assert!(polder(&[&common[..], &["--measure", "spectrum", "--steps", "3"]].concat()).status.success());
    // A few products are not enough, and the output says so.
    let rough = ["--measure", "top-eigenvalues", "--steps", "3", "--top", "2"];
    let printed = text(&polder(&[&common[..], &rough].concat()).stdout);
    assert!(printed.contains("not all within the tolerance"), "{printed}");
}

/// The options in a table for `docs/methods.md`, from their declarations.
fn table_of_options() -> String {
    let mut text = String::from("| option | of | values | default | what it is |\n|---|---|---|---|---|\n");
    for option in polder::train::options() {
        let setting = option.setting;
        let (of, default, help) = (option.owners(), option.default_text(), option.help().replace('|', "∣"));
        text += &format!("| `--{}` | {of} | {} | {default} | {help} |\n", setting.name, option.values());
    }
    text
}

#[test]
fn the_documented_options_are_the_declared_ones() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/methods.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once("<!-- options: ").unwrap();
    let (marker, rest) = rest.split_once('\n').unwrap();
    let (found, after) = rest.split_once("<!-- end of options -->").unwrap();
    let expected = table_of_options();
    if std::env::var_os("POLDER_WRITE_DOCS").is_some() {
        let text = format!("{before}<!-- options: {marker}\n{expected}<!-- end of options -->{after}");
        std::fs::write(&path, text).unwrap();
        return;
    }
    for (found, expected) in found.lines().zip(expected.lines()) {
        assert_eq!(found, expected, "POLDER_WRITE_DOCS=1 writes the table");
    }
    assert_eq!(found.lines().count(), expected.lines().count());
    // The help text has the same options and defaults.
    let help = text(&polder(&["train", "--help"]).stdout);
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for option in polder::train::options() {
        assert!(words.contains(&format!("--{} ", option.setting.name)), "{}", option.setting.name);
        let default = option.default_text();
        if !default.is_empty() {
            assert!(words.contains(&format!("[default: {default}]")), "{}: {default}", option.setting.name);
        }
    }
}

#[test]
fn what_is_wrong_in_the_folder_of_a_run_is_named_before_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let data = idx_folder(folder.path());
    let out = folder.path().join("run");
    short_run(folder.path(), data.to_str().unwrap(), &out);
    let path = |name: &str| out.join(name);
    let resume = ["train", "--resume", out.to_str().unwrap(), "--epochs", "3"];
    let (model, checkpoint) = (path("model.safetensors"), path("checkpoint"));

    // The weights would be written after the last epoch.
    std::fs::rename(&model, path("kept")).unwrap();
    std::fs::create_dir(&model).unwrap();
    let before = std::fs::read(path("log.jsonl")).unwrap();
    let message = mistake(&resume);
    assert!(message.contains("model.safetensors: a folder, where the run needs a file"), "{message}");
    assert_eq!(std::fs::read(path("log.jsonl")).unwrap(), before);
    std::fs::remove_dir(&model).unwrap();
    std::fs::rename(path("kept"), &model).unwrap();

    // A checkpoint that is there and cannot be read is not missing.
    std::fs::rename(&checkpoint, path("kept")).unwrap();
    std::fs::write(&checkpoint, "").unwrap();
    let message = mistake(&resume);
    assert!(message.contains("state.safetensors: Not a directory"), "{message}");
    std::fs::remove_file(&checkpoint).unwrap();
    std::fs::create_dir_all(checkpoint.join("state.safetensors")).unwrap();
    let message = mistake(&resume);
    assert!(message.contains("state.safetensors: not a regular file"), "{message}");
    std::fs::remove_dir_all(&checkpoint).unwrap();
    std::fs::rename(path("kept"), &checkpoint).unwrap();

    std::fs::write(path("log.jsonl"), [&before[..], b"{\"kind\":\"\xff"].concat()).unwrap();
    assert!(polder(&resume).status.success());
    let log = std::fs::read_to_string(path("log.jsonl")).unwrap();
    assert!(log.as_bytes().starts_with(&before) && log.len() > before.len());
}

#[test]
fn models_are_listed_with_their_sizes() {
    let list = json(&polder(&["models", "--json"]));
    // Counted in PyTorch: for each convolution and linear layer, twice the products of one image.
    for (name, parameters, flops) in [
        ("resnet18", 11_173_962u64, 1_110_845_440u64),
        ("wrn-28-10", 36_479_194, 10_486_657_536),
        ("pyramidnet-272", 26_210_842, 8_977_556_352),
    ] {
        let model = &list[name];
        assert_eq!((&model["parameters"], &model["forward_flops"]), (&parameters.into(), &flops.into()), "{name}");
    }
    let lines = text(&polder(&["models"]).stdout);
    for (name, model) in list.as_object().unwrap() {
        assert!(lines.lines().any(|line| line.starts_with(&format!("{name} "))), "{name}: {lines}");
        // Every activation of the first stage is kept for the backward: at least 16 channels of 32x32 pixels.
        assert!(model["activation_bytes"].as_u64().unwrap() > 128 * 16 * 32 * 32 * 4, "{name}");
    }
}

#[test]
fn a_recipe_is_listed_as_it_can_be_typed() {
    let lines = text(&polder(&["recipes"]).stdout);
    let recipe = lines.lines().skip_while(|line| *line != "sam/cifar10/wrn-28-10/sam").nth(1).unwrap();
    assert!(recipe.contains(" --nesterov --"), "{recipe}");
    let settings = &json(&polder(&["recipes", "--json"]))["sam/cifar10/wrn-28-10/sam"]["settings"];
    assert_eq!((&settings["model"], &settings["nesterov"]), (&"wrn-28-10".into(), &"true".into()));
}

/// A `.npy` file of unsigned bytes.
fn write_bytes(path: &Path, sizes: &[usize], values: &[u8]) {
    let sizes: String = sizes.iter().map(|size| format!("{size},")).collect();
    let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({sizes}), }}\n");
    let start = [&b"\x93NUMPY\x01\x00"[..], &(header.len() as u16).to_le_bytes(), header.as_bytes()].concat();
    std::fs::write(path, [&start, values].concat()).unwrap();
}

#[test]
fn corrupted_images_are_evaluated_by_corruption_and_severity() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let run = path("run");
    let train = ["train", "--train-size", "64", "--batch-size", "16", "--epochs", "2", "--device", "cpu", "--quiet"];
    assert!(polder(&[&train[..], &["--out", &run]].concat()).status.success());

    // Six images; the severities have other labels, so that none is taken for another.
    let images = polder::data::synthetic(&Default::default()).unwrap().test.bytes_of(0..6).unwrap().into_owned();
    let pixels: Vec<u8> = (1..=5u8).flat_map(|severity| images.iter().map(move |&value| value / severity)).collect();
    let labels: Vec<u8> = (0..30u8).map(|index| (index * 7 + index / 6) % 10).collect();
    let corrupted = path("corrupted");
    std::fs::create_dir(&corrupted).unwrap();
    let file = |name: &str| Path::new(&corrupted).join(name);
    write_bytes(&file("labels.npy"), &[30], &labels);
    write_bytes(&file("fog.npy"), &[30, 32, 32, 3], &pixels);
    write_bytes(&file("gaussian_noise.npy"), &[30, 32, 32, 3], &vec![77; pixels.len()]);
    write_bytes(&file("spatter.npy"), &[30, 32, 32, 3], &pixels);

    let eval = ["eval", "--run", &run, "--device", "cpu", "--data", &corrupted];
    let all = json(&polder(&[&eval[..], &["--corruption", "all", "--json"]].concat()));
    assert_eq!((all["data"].as_str(), all["samples"].as_u64()), (Some("cifar-10-c"), Some(6)));
    let rows = all["corruptions"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["gaussian_noise", "fog", "spatter"]);
    let errors = |row: &serde_json::Value| -> Vec<f64> {
        row["errors"].as_array().unwrap().iter().map(|error| error.as_f64().unwrap()).collect()
    };
    assert_eq!(errors(&rows[1]), errors(&rows[2]));
    // Each severity has the errors and the loss of the same images in a data set of their own.
    let alone = path("alone");
    std::fs::create_dir(&alone).unwrap();
    for severity in 1..=5 {
        let part = severity * 6 - 6..severity * 6;
        let images = &pixels[part.start * 3072..part.end * 3072];
        write_bytes(&Path::new(&alone).join("test_images.npy"), &[6, 32, 32, 3], images);
        write_bytes(&Path::new(&alone).join("test_labels.npy"), &[6], &labels[part]);
        let found = json(&polder(&["eval", "--run", &run, "--device", "cpu", "--data", &alone, "--json"]));
        assert_eq!(errors(&rows[1])[severity - 1] * 6.0, found["errors"].as_f64().unwrap());
        assert_eq!(rows[1]["losses"][severity - 1], found["loss"]);
    }
    // The four corruptions for validation are not in the mean.
    assert_eq!(all["mean_of"], 2);
    let mean: f64 = [errors(&rows[0]), errors(&rows[1])].concat().iter().sum::<f64>() / 10.0;
    assert!(abs_diff_eq!(all["mean_error"].as_f64().unwrap(), mean, epsilon = 1e-12), "{all} {mean}");

    let table = text(&polder(&[&eval[..], &["--corruption", "all"]].concat()).stdout);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines[0], "cifar-10-c, 6 images: error in % at each severity");
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["corruption", "1", "2", "3", "4", "5", "mean"]);
    let shown = |errors: Vec<f64>| errors.iter().map(|error| format!("{:.2}", 100.0 * error)).collect::<Vec<_>>();
    assert_eq!(lines[3].split_whitespace().skip(1).take(5).collect::<Vec<_>>(), shown(errors(&rows[1])));
    assert!(lines.len() == 6 && lines[5].starts_with("mean of 2"), "{table}");
    let one = json(&polder(&[&eval[..], &["--corruption", "fog", "--severity", "4", "--json"]].concat()));
    assert_eq!((&one["severities"][0], errors(&one["corruptions"][0])[0]), (&4.into(), errors(&rows[1])[3]));
    let first = json(&polder(&[&eval[..], &["--corruption", "fog", "--samples", "2", "--json"]].concat()));
    assert_eq!(first["samples"], 2);

    for (wrong, words) in [
        (&["--corruption", "snow"][..], "no snow.npy; it has gaussian_noise, fog, spatter"),
        (&["--corruption", "all", "--split", "train"], "--split: train, expected test"),
        (&["--corruption", "all", "--logits", "x.npy"], "--logits: not written for corrupted images"),
        (&["--corruption", "all", "--severity", "6"], "--severity: 6, expected 1 to 5"),
        (&["--severity", "2"], "--severity: only with --corruption"),
        (&[], "holds corrupted test images"),
    ] {
        let message = mistake(&[&eval[..], wrong].concat());
        assert!(message.contains(words), "{wrong:?}: {message}");
    }
    let message = mistake(&["eval", "--run", &run, "--device", "cpu", "--corruption", "all"]);
    assert!(message.contains("--data: missing; --corruption needs"), "{message}");
    let message = mistake(&[&eval[..], &["--corruption", "fog", "--image-size", "8"]].concat());
    assert!(message.contains("--image-size: has no effect with --corruption"), "{message}");
}

/// Corrupted images of a data set are what `eval --corruption` reads.
#[test]
fn corrupted_images_are_written_as_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (data, out) = (path("data"), path("out"));
    std::fs::create_dir(&data).unwrap();
    let found = polder::data::synthetic(&Default::default()).unwrap();
    for (split, images) in [("train", &found.train), ("test", &found.test)] {
        let labels: Vec<u8> = images.labels[..6].iter().map(|&label| label as u8).collect();
        let file = |kind: &str| Path::new(&data).join(format!("{split}_{kind}.npy"));
        write_bytes(&file("images"), &[6, 32, 32, 3], &images.bytes_of(0..6).unwrap());
        write_bytes(&file("labels"), &[6], &labels);
    }
    let corrupt = ["corrupt", "--data", &data, "--seed", "4"];
    let done = polder(&[&corrupt[..], &["--out", &out]].concat());
    assert!(done.status.success(), "{done:?}");
    let corrupted = polder::data::Corrupted::open(Path::new(&out)).unwrap();
    let names: Vec<&str> = polder::data::CORRUPTIONS.iter().map(|corruption| corruption.name).collect();
    let mut sorted = [corrupted.names.clone(), names.iter().map(|name| name.to_string()).collect()];
    sorted.iter_mut().for_each(|names| names.sort());
    assert_eq!(sorted[0], sorted[1]);
    let fog = corrupted.read("fog", 5).unwrap().images;
    assert_eq!(fog.labels, found.test.labels[..6]);
    // A part of the images and of the corruptions has the same bytes.
    let part = path("part");
    let some = ["--corruptions", "fog,contrast", "--samples", "2", "--threads", "1", "--out", &part];
    assert!(polder(&[&corrupt[..], &some].concat()).status.success());
    let part = polder::data::Corrupted::open(Path::new(&part)).unwrap();
    assert_eq!(part.read("fog", 5).unwrap().images.pixels, fog.bytes_of(0..2).unwrap().into_owned().into());
    for (arguments, words) in [
        (&["corrupt", "--data", &data, "--out", &out][..], "is not empty"),
        (&["corrupt", "--data", &data, "--corruptions", "frost", "--out", &path("new")], "--corruptions: frost"),
        (&["corrupt", "--data", &data, "--samples", "7", "--out", &path("new")], "--samples"),
        (&["corrupt", "--out", &path("new")], "--data: missing"),
    ] {
        let message = mistake(arguments);
        assert!(message.contains(words), "{arguments:?}: {message}");
    }
    assert!(!Path::new(&path("new")).exists());
}

#[test]
fn corrupt_refuses_other_images() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let data = path("data");
    std::fs::create_dir(&data).unwrap();
    for split in ["train", "test"] {
        write_bytes(&Path::new(&data).join(format!("{split}_images.npy")), &[2, 8, 8, 3], &[7; 2 * 192]);
        write_bytes(&Path::new(&data).join(format!("{split}_labels.npy")), &[2], &[0, 1]);
    }
    let message = mistake(&["corrupt", "--data", &data, "--out", &path("out")]);
    assert!(message.contains("--data: images of 8x8x3 in 2 classes, expected 32x32x3"), "{message}");
    assert!(!Path::new(&path("out")).exists());
}

#[test]
fn pictures_of_any_size_are_trained_on_and_evaluated() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    for (split, count) in [("train", 16u32), ("val", 4)] {
        for index in 0..count {
            let (class, side) = (["bright", "dark"][(index % 2) as usize], 9 + index);
            let value = if index % 2 == 0 { 230 } else { 20 + index as u8 };
            let path = data.join(split).join(class).join(format!("{index}.png"));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::RgbImage::from_pixel(side, 12, image::Rgb([value; 3])).save(path).unwrap();
        }
    }
    let (data, run) = (data.to_str().unwrap(), folder.path().join("run"));
    let run = run.to_str().unwrap();
    let train =
        ["train", "--data", data, "--batch-size", "8", "--epochs", "4", "--device", "cpu", "--json", "--out", run];
    let message = mistake(&train);
    assert!(
        message.contains("error: --image-size: ") && message.contains("; --image-size makes them the same"),
        "{message}"
    );
    let trained = json(&polder(&[&train[..], &["--image-size", "8"]].concat()));
    // The size is the run's.
    let found = json(&polder(&["eval", "--run", run, "--device", "cpu", "--json"]));
    assert_eq!((&found["samples"], &found["loss"]), (&4.into(), &trained["test"]["loss"]));
    // Nothing depends on whether the pictures are in memory, and a run may go on either way.
    let streamed = folder.path().join("streamed");
    let train = [&train[..train.len() - 1], &[streamed.to_str().unwrap(), "--image-size", "8"]].concat();
    let found = json(&polder(&[&train[..], &["--image-memory", "0"]].concat()));
    assert_eq!(found["test"], trained["test"]);
    let both = |command: &[&str]| {
        let run = ["--run", run, "--device", "cpu", "--json", "--image-memory"];
        ["1", "0"].map(|memory| json(&polder(&[command, &run, &[memory]].concat())))
    };
    for command in [&["eval"][..], &["eval", "--split", "train", "--samples", "9"], &["curvature", "--samples", "6"]] {
        let [memory, files] = both(command);
        assert_eq!(memory, files, "{command:?}");
    }
    let landscape = folder.path().join("landscape");
    let points = ["landscape", "--samples", "6", "--points", "3", "--out", landscape.to_str().unwrap()];
    let [memory, files] = both(&points);
    assert_eq!(memory, files, "the second one goes on with the points of the first");
    let resumed = ["train", "--resume", run, "--epochs", "5", "--device", "cpu", "--json", "--image-memory", "0"];
    json(&polder(&resumed));
    let damaged = Path::new(data).join("val/dark/3.png");
    std::fs::write(&damaged, "none").unwrap();
    let message = mistake(&["eval", "--run", run, "--device", "cpu", "--image-memory", "0"]);
    assert!(message.contains("3.png: not a picture that can be read"), "{message}");
    let message = mistake(&["eval", "--run", run, "--device", "cpu", "--data", "synthetic", "--image-size", "8"]);
    assert!(
        message.contains("synthetic has images of one size; --image-size is for folders of pictures alone"),
        "{message}"
    );
}

#[test]
fn a_pickle_that_wants_a_program_run_ends_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let touched = folder.path().join("touched");
    let command = format!("touch {}", touched.display());
    let pickle = [&b"\x80\x02cposix\nsystem\n(U"[..], &[command.len() as u8], command.as_bytes(), b"tR."].concat();
    std::fs::write(folder.path().join("data_batch_1"), pickle).unwrap();
    let message = mistake(&["train", "--data", folder.path().to_str().unwrap(), "--device", "cpu"]);
    assert!(message.contains("data_batch_1: the pickle names `posix.system`, which no data set needs"), "{message}");
    assert!(!touched.exists());
}
