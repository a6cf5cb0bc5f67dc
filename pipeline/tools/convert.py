"""`pipeline convert`: files and commands of LLaMA-Factory, Axolotl, TRL, alignment-handbook and MedicalGPT → a config.

    convert(sources, out, dataset_info=None, commit_of=pinned_commit) -> Converted

* `sources`: YAML files, shell scripts, and command lines (one text, or its words), in the order of the chain.
* `out`: the path of the config that the caller will write. Templates go beside it.
* `dataset_info`: LLaMA-Factory's dataset_info.json, where it is not in `dataset_dir`.
* `Converted.text` is the YAML, `.files` maps paths of side files to their texts, `.notes` are sentences for the user.

Nothing is written here, and no command is run. Raises ConfigError with every reason if no stage is left.
"""
