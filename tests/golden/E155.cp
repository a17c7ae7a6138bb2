use "../pab.cp"
