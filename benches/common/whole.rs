//! What the programs share that read and write images from end to end: what they are
//! told on the command line, and medians.

use std::path::PathBuf;

/// What is measured with.
pub struct Settings {
    /// Where the files go.
    pub directory: PathBuf,
    /// Of the disk.
    pub bytes: usize,
    pub rounds: usize,
}

impl Settings {
    /// From the command line.
    pub fn given() -> Settings {
        let (directory, bytes, rounds) = (std::env::temp_dir(), 256 << 20, 5);
        let mut settings = Settings { directory, bytes, rounds };
        let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
        while let Some(word) = words.next() {
            let value = words.next().unwrap_or_else(|| panic!("{word} needs a value"));
            let number = || value.parse::<usize>().expect("a number");
            match word.as_str() {
                "--dir" => settings.directory = value.into(),
                "--megabytes" => settings.bytes = number() << 20,
                "--rounds" => settings.rounds = number(),
                _ => panic!("{word}: there are --dir, --megabytes and --rounds"),
            }
        }
        settings
    }
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
