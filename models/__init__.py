"""Model families, their weight tables and how they are built on Megatron-Core.

The public calls live in their modules: ``families.register_family`` and ``load_model_config``,
``builder.build_model``, ``hf.load_hf``, ``hf.initialize`` and ``hf.export_hf``. They are not imported
here, so that reading a config needs neither torch nor Megatron.
"""
