//! What is wrong in a folder of manifests.

use std::path::{Path, PathBuf};

use ferrule_model::condition::Reason;
use ferrule_model::kube::ObjectKey;
use ferrule_model::plan::ConditionRow;

use super::document::DocumentError;
use super::{Report, Trouble};

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The object, where that could be read.
    pub(crate) object: Option<ObjectKey>,
    /// Line in the file, 0 for the file as a whole.
    pub(crate) line: u64,
    /// What is wrong: line, object, field.
    pub(crate) words: String,
    /// The same without the line: field and what is wrong with it.
    pub(crate) about_field: String,
    /// Nothing could be made of it: not even YAML, or not to be read at all.
    pub(crate) fatal: bool,
    /// There is a last good state of what is wrong, and it stays in use.
    pub(crate) kept: bool,
}

/// What was found in a folder as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    /// What is wrong with the folder itself.
    pub(crate) folder: Option<String>,
    /// By file.
    pub(crate) problems: Vec<(PathBuf, Problem)>,
    /// Objects that are defined more than once, and the file whose definition
    /// counts, unless none can be read.
    pub(crate) repeated: Vec<(ObjectKey, Option<PathBuf>)>,
}

impl Problem {
    pub(super) fn of(error: &DocumentError, kept: bool) -> Self {
        Self {
            object: error.object.as_deref().cloned(),
            line: error.line,
            words: error.to_string(),
            about_field: error.about_field(),
            fatal: error.syntax,
            kept,
        }
    }

    pub(super) fn fatal(words: String, kept: bool) -> Self {
        Self {
            object: None,
            line: 0,
            about_field: words.clone(),
            words,
            fatal: true,
            kept,
        }
    }

    /// What the agent does about it.
    pub(crate) fn effect(&self) -> &'static str {
        if self.kept {
            "its last good state stays in use"
        } else {
            "it is left out"
        }
    }
}

impl Findings {
    /// What is wrong with the documents themselves. Files are named from `folder`
    /// on, so that the same files say the same wherever they lie.
    pub(crate) fn conditions(&self, folder: &Path) -> Vec<ConditionRow> {
        let name = |path: &Path| {
            let name = path.strip_prefix(folder).unwrap_or(path);
            name.display().to_string()
        };
        let broken = self.problems.iter().filter(|(_, problem)| !problem.fatal);
        let broken = broken.map(|(path, problem)| {
            let (object, line, message) = match &problem.object {
                Some(object) => (object.to_string(), 0, &problem.about_field),
                // Nothing but the place says which document it is.
                None => (format!("File {}", name(path)), problem.line, &problem.words),
            };
            ConditionRow {
                object,
                reason: Reason::InvalidObject.to_string(),
                line,
                message: message.clone(),
            }
        });
        let repeated = self.repeated.iter().map(|(key, path)| ConditionRow {
            object: key.to_string(),
            reason: Reason::DuplicateObject.to_string(),
            line: 0,
            message: match path {
                Some(path) => format!(
                    "metadata.name: the object is defined more than once, the last definition in path \
                     order that can be read counts, in {}; remove the others",
                    name(path)
                ),
                None => {
                    "metadata.name: the object is defined more than once, and no definition can be \
                         read; remove all but one"
                        .to_owned()
                }
            },
        });
        broken.chain(repeated).collect()
    }

    /// The same for `status`, where documents that cannot be read are troubles.
    pub(super) fn report(&self, root: &Path) -> Report {
        let folder = self.folder.iter().map(|words| Trouble {
            object: format!("manifests in {}", root.display()),
            problem: format!("the folder {words}"),
            remedy: "make the folder readable for the agent".to_owned(),
            since: None,
        });
        let files = self.problems.iter().map(|(path, problem)| Trouble {
            object: format!("file {}", path.display()),
            problem: format!("{}; {}", problem.words, problem.effect()),
            remedy: "correct the file, or remove it".to_owned(),
            since: None,
        });
        let read = Self {
            problems: Vec::new(),
            ..self.clone()
        };
        Report {
            troubles: folder.chain(files).collect(),
            conditions: read.conditions(Path::new("")),
        }
    }
}
